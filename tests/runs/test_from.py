"""Training that starts from a trained flow, by `from=RUN` or by `fit(x, flow=...)`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run

import flowtrain
from flowtrain.flow import Flow
from flowtrain.utils.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("float32", "without_figures")

NAMES = ["x", "size", "n", "sex", "colour"]
TYPES = "data.types={size: positive, n: integer, sex: categorical}"
SMALL = ["trainer.steps=6", "trainer.val_every=3"]
MODEL = ["model=nsf", "model.layers=2", "model.hidden=[4]", "data=array", TYPES, "data.context=[colour]"]


class Frame:
    """A data frame with only the attributes that flowtrain needs."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.of = columns
        self.columns = list(columns)

    def to_numpy(self) -> Any:
        return np.column_stack([np.asarray(values, dtype=object) for values in self.of.values()])

    def __getitem__(self, name: str) -> Any:
        return self.of[name]


def columns(n: int = 150, sexes: str = "fmx", colours: str = "rgb", seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=n).astype(np.float32),
        "size": rng.exponential(1 + seed, size=n).astype(np.float32),
        "n": rng.integers(0, 9, n),
        "sex": rng.choice(list(sexes), n),
        "colour": rng.choice(list(colours), n),
    }


def csv(path: Path, table: dict[str, Any]) -> str:
    rows = zip(*table.values(), strict=True)
    path.write_text("\n".join([",".join(table), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def last_line(out: str) -> str:
    return out.strip().splitlines()[-1]


@pytest.fixture
def first(run: Run, tmp_path: Path) -> str:
    code, out, err = run("flowtrain", *MODEL, f"data.path={csv(tmp_path / 'a.csv', columns())}", *SMALL)
    assert code == 0, err
    return last_line(out)


def test_from_keeps_the_types_of_the_run_for_a_file_with_fewer_categories(run: Run, first: str, tmp_path: Path) -> None:
    some = csv(tmp_path / "b.csv", columns(90, "xf", "g", seed=1))
    code, out, err = run("flowtrain", f"from={first}", f"data.path={some}", *SMALL)
    assert code == 0, err
    second = last_line(out)
    before, after = flowtrain.load(first), flowtrain.load(second)
    assert (after.types, after.context) == (before.types, before.context)
    # a resume and an evaluation must use these categories, not the categories of the file
    assert run("flowtrain", f"resume={second}", "trainer.steps=9")[0] == 0
    code, _, err = run("floweval", f"ckpt={second}")
    assert code == 0, err
    code, _, err = run("floweval", f"ckpt={first}", f"data.path={some}", "split=test")
    assert code == 0, err


def test_from_refuses_a_new_category_by_its_name(run: Run, first: str, tmp_path: Path) -> None:
    for keys in ({"sexes": "fmxw"}, {"colours": "rgbw"}):
        other = csv(tmp_path / "b.csv", columns(90, **keys))
        code, _, err = run("flowtrain", f"from={first}", f"data.path={other}", *SMALL)
        assert code == 2
        assert "'w'" in err


def test_from_refuses_the_columns_in_another_order(run: Run, first: str, tmp_path: Path) -> None:
    table = columns()
    other = csv(tmp_path / "b.csv", {name: table[name] for name in ("n", "x", "size", "sex", "colour")})
    code, _, err = run("flowtrain", f"from={first}", f"data.path={other}", *SMALL)
    assert code == 2
    assert "'n', 'x', 'size'" in err


def test_from_keeps_the_number_of_classes(run: Run, tmp_path: Path) -> None:
    def file(name: str, classes: int) -> str:
        rng = np.random.default_rng(classes)
        return csv(tmp_path / name, {"x": rng.normal(size=90), "y": rng.normal(size=90), "k": np.arange(90) % classes})

    keys = ["model=affine", "model.conditional=true", "data=array", "data.label=k", *SMALL]
    code, out, err = run("flowtrain", *keys, f"data.path={file('a.csv', 3)}")
    assert code == 0, err
    begun = f"from={last_line(out)}"
    code, out, err = run("flowtrain", begun, f"data.path={file('b.csv', 2)}", *SMALL)
    assert code == 0, err
    assert flowtrain.load(last_line(out)).classes == 3
    code, _, err = run("flowtrain", begun, f"data.path={file('c.csv', 4)}", *SMALL)
    assert code == 2
    assert "classes=3" in err


# In Python


@pytest.fixture(scope="module")
def fitted() -> Flow:
    overrides = {"data.types": {"size": "positive", "n": "integer", "sex": "categorical"}, "model.hidden": [4]}
    overrides |= {"model.layers": 2, "trainer.val_every": 3}
    return flowtrain.fit(
        Frame(columns()), model="nsf", context=["colour"], steps=6, progress=False, overrides=overrides
    )


def test_fit_trains_a_copy_of_a_flow_on_columns_that_it_finds_by_name(fitted: Flow, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in fitted.state_dict().items()}
    table = columns(90, "xf", "g", seed=1)
    other = Frame({name: table[name] for name in ("sex", "n", "colour", "size", "x")} | {"more": np.ones(90)})
    for steps, run_dir in ((30, None), (3, tmp_path / "r")):
        flow = flowtrain.fit(
            other, flow=fitted, context=["colour"], steps=steps, progress=False, run_dir=run_dir, seed=steps
        )
        assert flow is not fitted
        assert (flow.types, flow.context) == (fitted.types, fitted.context)
        assert all(torch.equal(before[name], value) for name, value in fitted.state_dict().items())
        assert flow.log_prob(other, context=other).mean() > fitted.log_prob(other, context=other).mean() - 0.1
    assert flowtrain.load(tmp_path / "r").types == fitted.types
    # one step with a tiny learning rate keeps the density, so the copy starts from the weights of the flow
    still = flowtrain.fit(
        other, flow=fitted, context=["colour"], steps=1, progress=False, overrides={"trainer.lr": 1e-12}
    )
    found = []
    for one in (still, fitted):
        # whole numbers get random noise
        torch.manual_seed(0)
        found.append(one.log_prob(other, context=other))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


def test_fit_refuses_data_and_arguments_that_do_not_fit_the_flow(fitted: Flow) -> None:
    table, wrong = columns(), columns(sexes="fmxw")
    ensemble = flowtrain.models.ensemble.Ensemble([fitted, fitted], [0.5, 0.5])
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (ConfigError, "model", Frame(table), {"model": "nsf"}),
        (ConfigError, "levels", Frame(table), {"levels": 3}),
        (ConfigError, "flowtrain.load", Frame(table), {"flow": "outputs/a"}),
        (ConfigError, "flow.flows", Frame(table), {"flow": ensemble}),
        (DataError, "'w'", Frame(wrong), {}),
        (DataError, "context", Frame(table), {"context": None}),
        (DataError, "shape", np.random.default_rng(0).normal(size=(90, 3)), {"context": None}),
    ]
    for kind, words, x, keys in cases:
        with pytest.raises(kind, match=words):
            flowtrain.fit(x, **{"flow": fitted, "context": ["colour"], "steps": 2, "progress": False, **keys})


def test_types_are_given_by_position_if_another_column_is_between() -> None:
    table = columns()
    order = ("colour", "x", "size", "n", "sex")
    flow = flowtrain.fit(
        Frame({name: table[name] for name in order}),
        model="affine",
        context=["colour"],
        steps=3,
        progress=False,
        overrides={"data.types": {"size": "positive", "n": "integer", "sex": "categorical"}},
    )
    flow.record = None
    record = flowtrain.train(
        flow, Frame({name: table[name] for name in order}), context=["colour"], steps=3, progress=False
    )
    assert [one.kind for one in record.samples.types] == ["real", "positive", "integer", "categorical"]


def test_fit_warns_of_rows_that_the_flow_may_have_seen(fitted: Flow, caplog: pytest.LogCaptureFixture) -> None:
    def warned(table: dict[str, Any]) -> bool:
        caplog.clear()
        flowtrain.fit(Frame(table), flow=fitted, context=["colour"], steps=2, progress=False)
        return any(record.levelname == "WARNING" and "held out" in record.message for record in caplog.records)

    assert warned(columns(140))
    assert not warned(columns())


@pytest.mark.parametrize("first", [True, False])
def test_fit_warns_of_changed_samples_and_not_of_changed_weights(first: bool, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(120, 2)), [rng.uniform(1, 2, 120) if first == k else None for k in (True, False)]
    flow = flowtrain.fit(x, model="affine", weights=weights[0], steps=2, progress=False)

    def warned(x: np.ndarray) -> bool:
        caplog.clear()
        flowtrain.fit(x, flow=flow, weights=weights[1], steps=2, progress=False)
        return any(record.levelname == "WARNING" and "held out" in record.message for record in caplog.records)

    assert not warned(x)
    assert warned(x[::-1].copy())


def test_fit_keeps_the_types_for_a_file(fitted: Flow, tmp_path: Path) -> None:
    path = csv(tmp_path / "a.csv", columns())
    again = flowtrain.fit(path, flow=fitted, context=["colour"], steps=2, progress=False)
    assert again.types == fitted.types


def test_fit_keeps_the_types_for_a_file_without_names(tmp_path: Path) -> None:
    np.savetxt(path := tmp_path / "a.txt", np.random.default_rng(0).exponential(size=(90, 2)))
    flow = flowtrain.fit(path, model="affine", steps=2, progress=False, overrides={"data.types": {"1": "positive"}})
    assert flowtrain.fit(path, flow=flow, steps=2, progress=False).types == flow.types


def test_fit_refuses_the_columns_of_a_file_in_another_order(tmp_path: Path) -> None:
    """The flow would be trained on other columns. The message names the option that puts them in order."""
    rng = np.random.default_rng(0)
    table = {"x": rng.normal(size=90), "y": 100 + rng.normal(size=90)}
    flow = flowtrain.fit(csv(tmp_path / "a.csv", table), model="affine", steps=2, progress=False)
    path = csv(tmp_path / "b.csv", dict(reversed(table.items())))
    with pytest.raises(DataError, match=r"'data.columns': \['x', 'y'\]"):
        flowtrain.fit(path, flow=flow, steps=2, progress=False)
    again = flowtrain.fit(path, flow=flow, steps=2, progress=False, overrides={"data.columns": ["x", "y"]})
    assert again.record is not None
    assert again.record.samples.columns == ("x", "y")
