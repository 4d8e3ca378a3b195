"""The posterior of a logistic regression against NumPy, scikit-learn and SciPy, and the messages about its table."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.linear_model import LogisticRegression as Sklearn

from flowtrain.data.targets.regression import LogisticRegression, laplace
from flowtrain.runs.build import build_target
from flowtrain.runs.compose import compose
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, 100.0]
Y = (X[:, 0] + 0.1 * X[:, 1] + RNG.logistic(size=60) > 0.5).astype(int)
NAMES = ["age", "income", "height"]


def table(path: Path, labels: list[object], features: np.ndarray = X) -> Path:
    rows = [",".join(map(repr, map(float, x))) + f",{y}" for x, y in zip(features, labels, strict=True)]
    path.write_text("\n".join([",".join([*NAMES, "class"]), *rows]) + "\n")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return table(tmp_path / "t.csv", [["no", "yes"][y] for y in Y])


def standardised() -> np.ndarray:
    return (X - X.mean(0)) / X.std(0)


def expected(w: np.ndarray, prior_scale: float) -> np.ndarray:
    logits = w[:, :-1] @ standardised().T + w[:, -1:]
    p = stats.bernoulli.logpmf(Y, 1 / (1 + np.exp(-logits))).sum(1)
    return p + stats.norm.logpdf(w, 0, prior_scale).sum(1)


@pytest.mark.parametrize("prior_scale", [1.0, 2.5])
def test_the_density_is_likelihood_times_prior(path: Path, prior_scale: float) -> None:
    target = LogisticRegression(path, "class", prior_scale=prior_scale)
    w = RNG.normal(size=(20, 4))
    np.testing.assert_allclose(target(torch.tensor(w)).numpy(), expected(w, prior_scale), rtol=1e-10)
    assert target.columns == (*NAMES, "intercept")
    assert torch.autograd.gradcheck(target, torch.tensor(w[:3], requires_grad=True))


def test_float32_is_close_to_float64_and_tails_are_finite(path: Path) -> None:
    target = LogisticRegression(path, "class")
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[1e6] * 4, [-1e6, 1e6, 0, 0], [0.0] * 4], dtype=dtype, requires_grad=True)
        log_p = target(x)
        (slope,) = torch.autograd.grad(log_p.sum(), x)
        assert log_p.dtype == dtype
        assert log_p.isfinite().all()
        assert slope.isfinite().all()
    w = torch.tensor(RNG.normal(size=(100, 4)))
    torch.testing.assert_close(target(w.float()).double(), target(w), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("labels", [[0, 1], [3, 7], [-1, 1], ["a", "b"], ["1", "x"], ["false", "true"], ["B", "a"]])
def test_the_second_label_in_sorted_order_is_the_positive_class(tmp_path: Path, labels: list[object]) -> None:
    target = LogisticRegression(table(tmp_path / "l.csv", [labels[y] for y in Y]), "class")
    w = RNG.normal(size=(5, 4))
    np.testing.assert_allclose(target(torch.tensor(w)).numpy(), expected(w, 1.0), rtol=1e-10)


def test_the_order_of_rows_does_not_decide_the_positive_class(tmp_path: Path) -> None:
    w = torch.tensor(RNG.normal(size=(5, 4)))
    order, labels = np.argsort(Y), np.array(["no", "yes"])[Y]
    found, turned = (
        LogisticRegression(table(tmp_path / f"{i[0]}.csv", list(labels[i]), X[i]), "class")(w)
        for i in (order, order[::-1])
    )
    torch.testing.assert_close(found, turned)
    assert labels[order][0] != labels[order][-1]


def test_initial_distribution_is_the_laplace_approximation(path: Path) -> None:
    target = LogisticRegression(path, "class", prior_scale=0.8)
    found = optimize.minimize(lambda w: -expected(w[None], 0.8)[0], np.zeros(4), tol=1e-10)
    np.testing.assert_allclose(target.loc.numpy(), found.x, atol=1e-4)
    hessian = torch.autograd.functional.hessian(lambda w: -target(w[None]).sum(), target.loc)
    torch.testing.assert_close(target.scale, torch.linalg.inv(hessian).diagonal().sqrt())
    given = LogisticRegression(path, "class", loc=0.0, scale=[1.0, 2.0, 3.0, 4.0])
    assert (given.loc.tolist(), given.scale.tolist()) == ([0.0] * 4, [1.0, 2.0, 3.0, 4.0])


def test_mode_of_separable_classes_equals_scikit_learn() -> None:
    x = RNG.normal(size=(40, 2))
    y = np.sign(x[:, 0])
    for scale in (0.1, 10.0, 1000.0):
        rows = torch.tensor(y[:, None] * x)
        mode, _ = laplace(rows, scale)
        expected = Sklearn(C=scale**2, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x, y).coef_[0]
        np.testing.assert_allclose(mode.numpy(), expected, rtol=1e-3)


def test_columns_choose_the_features(path: Path) -> None:
    target = LogisticRegression(path, "class", columns=["height", 0])
    assert target.columns == ("height", "age", "intercept")


def test_config_builds_the_target_from_an_array(path: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.column_stack([Y, X]))
    settings = {"data": "target", "target": "logistic_regression", "target.path": str(tmp_path / "t.npy")}
    found = build_target(compose({**settings, "target.label": 0}).config)
    w = torch.tensor(RNG.normal(size=(5, 4)))
    torch.testing.assert_close(found(w), LogisticRegression(path, "class")(w))


@pytest.mark.parametrize(
    ("keys", "kind", "part"),
    [
        ({"label": "class"}, ConfigError, r"target\.path"),
        ({"path": "t.csv"}, ConfigError, r"target\.label"),
        ({"path": "t.csv", "label": "clas"}, ConfigError, r"target\.label"),
        ({"path": "t.csv", "label": "0:2"}, ConfigError, r"target\.label"),
        ({"path": "none.csv", "label": "class"}, DataError, r"none\.csv"),
        ({"path": "t.csv", "label": "age"}, DataError, "60"),
        ({"path": "t.csv", "label": "class", "columns": ["size"]}, ConfigError, r"target\.columns"),
        ({"path": "t.csv", "label": "class", "columns": ["age", "class"]}, ConfigError, r"target\.columns"),
        ({"path": "t.csv", "label": "class", "prior_scale": 0.0}, ConfigError, r"target\.prior_scale"),
        ({"path": "t.csv", "label": "class", "loc": [0.0]}, ConfigError, r"target\.loc"),
        ({"path": "text.csv", "label": "a"}, DataError, r"b.*target\.columns"),
        ({"path": "constant.csv", "label": "a"}, DataError, "c"),
        ({"path": "one.csv", "label": "a"}, DataError, "'a'"),
        ({"path": "missing.csv", "label": "a"}, DataError, r"line 2.*target\.missing"),
        ({"path": "missing.csv", "label": "a", "missing": "omit"}, ConfigError, r"target\.missing"),
        ({"path": "no_label.csv", "label": "a"}, DataError, "line 3"),
        ({"path": "intercept.csv", "label": "a"}, DataError, "intercept"),
        ({"path": "tiny.csv", "label": "a"}, DataError, "'b'"),
    ],
)
def test_invalid_tables_and_keys_are_refused(
    keys: dict[str, object], kind: type[FlowtrainError], part: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    Path("text.csv").write_text("a,b\n0,x\n1,y\n1,z\n")
    Path("constant.csv").write_text("a,b,c\n0,1,0.1\n1,2,0.1\n1,4,0.1\n")
    Path("one.csv").write_text("a\n0\n1\n1\n")
    Path("missing.csv").write_text("a,b\n0,\n1,2\n1,4\n")
    Path("no_label.csv").write_text("a,b\n0,1\n,2\n1,4\n")
    Path("intercept.csv").write_text("a,b,intercept\n0,1,2\n1,2,1\n1,4,0\n")
    Path("tiny.csv").write_text("a,b\n0,1e-200\n1,2e-200\n1,4e-200\n")
    with pytest.raises(kind, match=part) as found:
        LogisticRegression(**keys)  # type: ignore[arg-type]
    assert "\n" not in str(found.value)
    assert "data." not in str(found.value).replace("data.csv", "")


def test_rows_with_missing_values_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("a,b,c\nno,1,2\n,2,3\nyes,5,\nyes,7,-9\nno,0,1\nyes,3,3\n")
    (tmp_path / "kept.csv").write_text("a,b,c\nno,1,2\nno,0,1\nyes,3,3\n")
    w = torch.tensor(RNG.normal(size=(5, 3)))
    found = LogisticRegression(tmp_path / "m.csv", "a", missing="drop", na=-9)(w)
    torch.testing.assert_close(found, LogisticRegression(tmp_path / "kept.csv", "a")(w))
