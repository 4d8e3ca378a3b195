"""Runs on targets: validation by the ELBO, exact resume, failures, starts from a fitted flow, and `fit_target`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run
from helpers.densities import BANANA, BANANA_LOG_Z, KnownBanana, banana
from helpers.files import npy
from helpers.processes import trainer_of

import flowtrain
from flowtrain.data.targets.base import FunctionTarget, TargetData
from flowtrain.training import checkpoint
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import ConfigError, DataError, NonFiniteError

KEYS = ["data=target", "objective=reverse_kl", "data.n_val=50", "data.n_test=100", "recipe=none"]
KEYS += ["trainer.steps=10", "trainer.val_every=5", "trainer.log_every=1", "trainer.batch_size=16"]
KEYS += ["trainer.plot_every=null"]
NSF = ["model=nsf", "model.layers=2", "model.hidden=[8]", "model.bins=4"]
FFJORD = ["model=ffjord", "model.hidden=[8]", "trainer.guard_every=3"]


@pytest.fixture(autouse=True)
def in_float32() -> None:
    torch.set_default_dtype(torch.float32)


def trained(
    stop_at: Callable[..., None], run_dir: Path, *keys: str, stop: int | None = None, target: list[str] = BANANA
) -> Trainer:
    last = run_dir / "checkpoints/last.pt"
    saved = checkpoint.load(last) if last.exists() else None
    trainer = trainer_of(run_dir, [*KEYS, *target, *keys], saved)
    if stop:
        stop_at(trainer, stop)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("model", [NSF, [*NSF, "objective.anneal=0.5", "objective.gradient=total"], FFJORD])
def test_resume_is_bitwise_exact(model: list[str], tmp_path: Path, stop_at: Callable[..., None]) -> None:
    whole = trained(stop_at, tmp_path / "whole", *model)
    trained(stop_at, tmp_path / "parts", *model, stop=3)
    again = trained(stop_at, tmp_path / "parts", *model)
    for key, value in whole.flow.state_dict().items():
        assert torch.equal(value, again.flow.state_dict()[key]), key
    rows = [[row["nll"] for row in run.metrics.rows if row["step"] > 3] for run in (whole, again)]
    assert rows[0] == rows[1]


def test_validation_nll_is_the_negative_elbo_of_fixed_base_points(tmp_path: Path, stop_at: Callable[..., None]) -> None:
    run = trained(stop_at, tmp_path, *NSF, "trainer.ema=null")
    data, flow = run.data, run.flow.eval()
    assert isinstance(data, TargetData)
    torch.manual_seed(data.seed_of("val"))
    z = flow.base.rsample(50)
    with torch.no_grad():
        x = flow.forward(z)
        log_w = banana(x) - flow.log_prob(x)
    rows = [row for row in run.metrics.rows if row["split"] == "val"]
    assert rows[-1]["nll"] == pytest.approx(-log_w.mean().item(), abs=1e-5)
    assert rows[-1]["nll_stderr"] == pytest.approx(log_w.std().item() / 50**0.5, rel=1e-4)
    # the run seed does not change the base points
    other = trainer_of(tmp_path / "other", [*KEYS, *BANANA, *NSF, "seed=1"])
    assert isinstance(other.data, TargetData)
    assert other.data.seed_of("val") == data.seed_of("val") != data.seed_of("test")


def test_failed_step_is_skipped_or_stops(
    tmp_path: Path, stop_at: Callable[..., None], propagate_logs: None, caplog: pytest.LogCaptureFixture
) -> None:
    target = ["target=custom", "target._target_=helpers.densities.with_nan", "target.dim=2"]
    with pytest.raises(NonFiniteError, match=r"step 3: .*target\.types"):
        trained(stop_at, tmp_path / "stop", *NSF, target=target)
    keys = [*NSF, "trainer.batch_size=2", "trainer.on_nonfinite=skip"]
    run = trained(stop_at, tmp_path / "skip", *keys, target=target)
    assert run.step == 10
    assert "target.types" in caplog.text
    assert all(p.isfinite().all() for p in run.flow.parameters())


def test_target_without_matching_objective_or_data() -> None:
    for keys, what in [
        (["data=target", "objective=reverse_kl"], "target=funnel"),
        (["data=target", *BANANA, "objective=likelihood"], "objective=likelihood"),
        (["data=moons", "objective=reverse_kl"], "data=target"),
        (["data=moons", *BANANA], "data=target"),
        (["data=target", *BANANA, "objective=reverse_kl", "target.dim=0"], r"target\.dim"),
        (["data=target", *BANANA, "objective=reverse_kl", "+target.widht=2"], "width"),
        (["data=target", *BANANA, "objective=reverse_kl", "target.scale=[1,-1]"], r"target\.scale"),
        (["data=target", *BANANA, "objective=reverse_kl", "target.types={x3: positive}"], "x3"),
        (["data=target", *BANANA, "objective=reverse_kl", "target.types={x1: integer}"], "x1"),
        (["data=target", *BANANA, "objective=reverse_kl", "data.n_val=1"], r"data\.n_val"),
    ]:
        with pytest.raises(ConfigError, match=what):
            trainer_of(Path("unused"), [*keys, *NSF, "recipe=none"])


def test_function_has_arguments_from_the_config(tmp_path: Path) -> None:
    data = trainer_of(tmp_path, [*KEYS, *BANANA, *NSF, "+target.width=3.0"]).data
    assert isinstance(data, TargetData)
    x = torch.randn(5, 2)
    torch.testing.assert_close(data.target(x), banana(x, 3.0))


@pytest.mark.parametrize("types", ["positive", "interval(-1,3)", "interval(2,inf)", "interval(-inf,2)", "circular(6)"])
def test_initial_points_are_in_the_support(types: str) -> None:
    data = TargetData(FunctionTarget(lambda x: -x.sum(1), 1, [types], scale=2.0), 500, 500)
    assert data.types[0].contains_noisy(data.val).all()
    assert len(data.val.unique()) > 450
    low, high = data.types[0].support
    assert bool((data.val >= low).all() and (data.val <= high).all())


def test_functions_that_return_a_wrong_shape_are_refused() -> None:
    for function in (lambda x: x, lambda x: x.sum(), lambda x: 0.0):
        with pytest.raises(DataError, match="shape"):
            FunctionTarget(function, 2)(torch.zeros(3, 2))


def test_command_starts_from_a_flow_that_was_fitted_to_samples(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 1))
    rows = np.concatenate([x, x**2 + rng.normal(size=(400, 1))], 1)
    small = [*NSF[1:], "trainer.val_every=5", "trainer.plot_every=null"]
    code, out, _ = run(
        "flowtrain", "data=array", f"data.path={npy(tmp_path / 'x.npy', rows)}", "model=nsf", "name=first", *small,
        "trainer.steps=30",
    )  # fmt: skip
    first = tmp_path / out.splitlines()[-1]
    code, out, err = run("flowtrain", f"from={first}", *BANANA, "name=second", "trainer.steps=5", *KEYS[2:4])
    assert code == 0, err
    saved = checkpoint.load(tmp_path / out.splitlines()[-1] / "checkpoints/last.pt")
    assert saved["config"]["data"]["name"] == "target"
    assert saved["config"]["objective"]["name"] == "reverse_kl"
    # after five steps with a small learning rate, the weights are close to the weights of the first run
    before = checkpoint.load(first / "checkpoints/best.pt")
    for key, value in before["weights"].items():
        assert saved["weights"][key].shape == value.shape
    # the flow began with the standardization of the rows
    assert saved["samples"]["standardized"] == before["samples"]["standardized"]
    assert saved["samples"]["gaussian_start"] == before["samples"]["gaussian_start"]
    code, _, err = run("flowtrain", f"resume={tmp_path / out.splitlines()[-1]}", "trust=[helpers]", "trainer.steps=8")
    assert code == 0, err


def test_target_that_does_not_fit_the_first_flow_is_refused(run: Run, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(200, 3))
    small = [*NSF[1:], "trainer.steps=5", "trainer.plot_every=null"]
    path = f"data.path={npy(tmp_path / 'x.npy', rows)}"
    _, out, _ = run("flowtrain", "data=array", path, "model=nsf", "name=first", *small)
    first = tmp_path / out.splitlines()[-1]
    assert "3" in run("flowtrain", f"from={first}", *BANANA)[2]
    code, _, err = run("flowtrain", f"from={first}", *BANANA[:2], "target.dim=3", "target.types={x2: positive}")
    assert code == 2
    assert "x2" in err


def small_fit(density: Any, *arguments: Any, **named: Any) -> flowtrain.Flow:
    keys = {"model.hidden": [8], "model.layers": 2, "data.n_val": 50, "trainer.val_every": 5}
    overrides = {} if "flow" in named else keys
    return flowtrain.fit_target(density, *arguments, steps=10, progress=False, **{"overrides": overrides, **named})


def test_fit_target_equals_the_command(run: Run, tmp_path: Path) -> None:
    flow = small_fit(banana, 2, log_z=BANANA_LOG_Z, run_dir=tmp_path / "fit")
    code, out, err = run(
        "flowtrain", *BANANA, f"target.log_z={BANANA_LOG_Z}", "model.hidden=[8]", "model.layers=2", "data.n_val=50",
        "trainer.val_every=5", "trainer.steps=10", "name=command",
    )  # fmt: skip
    assert code == 0, err
    other = flowtrain.load(tmp_path / out.splitlines()[-1], trust=["helpers"])
    again = flowtrain.load(tmp_path / "fit", trust=["helpers"])
    for key, value in flow.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
        assert torch.equal(value, again.state_dict()[key]), key


def test_fit_target_with_a_closure_and_with_a_flow() -> None:
    scale = torch.tensor([2.0, 0.5])
    flow = small_fit(lambda x: -(x / scale).abs().sum(1), 2, types=["positive", "real"], columns=["a", "b"])
    assert flow.record is not None
    assert flow.record.samples.columns == ("a", "b")
    assert bool((flow.sample(100)[:, 0] > 0).all())
    before = {key: value.clone() for key, value in flow.state_dict().items()}
    further = small_fit(lambda x: -x.abs().sum(1), 2, flow=flow)
    assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in further.state_dict().items())
    assert further.record is not None
    assert not further.training


def test_refused_arguments_of_fit_target(tmp_path: Path) -> None:
    for density, arguments, named, what in [
        (3.0, (), {}, "log_density"),
        (banana, (), {}, "dim"),
        (lambda x: -x.sum(1), (2,), {"run_dir": tmp_path / "run"}, "run_dir"),
        (FunctionTarget(banana, 2), (2,), {}, "dim"),
        ("no such target", (), {}, "target"),
        (banana, (2,), {"objective": "likelihood"}, "likelihood"),
        (KnownBanana, (2,), {}, "KnownBanana"),
        (banana, (2,), {"types": "positive"}, "target.types"),
    ]:
        with pytest.raises(ConfigError, match=what):
            small_fit(density, *arguments, **named)
    assert not (tmp_path / "run").exists()


def test_fit_target_with_types_by_name_and_arrays(tmp_path: Path) -> None:
    flow = small_fit(banana, 2, types={"x1": "positive"}, loc=np.zeros(2), scale=torch.ones(2))
    assert [str(one) for one in flow.types] == ["positive", "real"]
    # a target and a name already determine the types
    started = small_fit("double_well", flow=small_fit(banana, 2))
    assert bool((small_fit(KnownBanana(), flow=started).sample(100) < 0).any())


def test_overrides_set_the_keys_of_a_function() -> None:
    overrides = ["target.loc=1000", "target.scale=0.1", "target.types=[real, interval(-1,2)]"]
    flow = flowtrain.fit_target(lambda x: banana(x), 2, steps=2, progress=False, overrides=overrides)
    same = flowtrain.fit_target(
        lambda x: banana(x), 2, steps=2, progress=False, loc=1000, scale=0.1, types=["real", "interval(-1,2)"]
    )
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), same.parameters(), strict=True))
    assert flow.types == same.types
    assert abs(flow.sample(50)[:, 0].mean() - 1000) < 1
    with pytest.raises(ConfigError, match=r"target\.lok"):
        flowtrain.fit_target(lambda x: banana(x), 2, steps=2, progress=False, overrides={"target.lok": 1})


def test_changed_table_of_a_regression_is_refused(run: Run, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 2))
    table = tmp_path / "t.csv"

    def write(columns: list[int]) -> None:
        lines = [",".join("abyz"[i] for i in (*columns, 2))]
        lines += [",".join(str(v) for v in (*row[columns], int(row[0] > 0))) for row in rows]
        table.write_text("\n".join(lines))

    write([0, 1])
    keys = ["target=logistic_regression", f"target.path={table}", "target.label=y", "model=affine", "data.n_test=50"]
    code, out, err = run("flowtrain", *keys, "trainer.steps=2", "trainer.val_every=1")
    assert code == 0, err
    first = tmp_path / out.splitlines()[-1]
    before, kept = (first / "result.json").read_bytes(), table.read_bytes()
    # no command overwrites the table
    for command in (["flowsample", f"ckpt={first}", f"out={table}", "n=5"],
                    ["floweval", f"ckpt={first}", "data=moons", f"scores={table}"]):  # fmt: skip
        assert run(*command)[0] == 2
        assert table.read_bytes() == kept
    rows[0] += 1
    write([0, 1])
    for command in (["floweval", f"ckpt={first}"], ["flowtrain", f"resume={first}", "trainer.steps=3"],
                    ["flowsample", f"ckpt={first}", "n=5", "weights=true"]):  # fmt: skip
        code, _, err = run(*command)
        assert code == 2, command
        assert "the training file" in err
    write([1, 0])
    other = table.rename(tmp_path / "other.csv")
    code, _, err = run("floweval", f"ckpt={first}", f"target.path={other}")
    assert code == 2
    assert "a, b, intercept" in err
    assert (first / "result.json").read_bytes() == before
    assert not (first / "eval.json").exists()


def test_from_keeps_the_target_of_the_run(run: Run, tmp_path: Path) -> None:
    small = ["model=affine", "trainer.steps=2", "data.n_test=50", "data.n_val=50", "name=first"]
    code, _, err = run("flowtrain", "target=gaussian_mixture", "target.std=3.0", "target.n_modes=3", *small)
    assert code == 0, err
    first = tmp_path / "outputs/first"
    code, _, err = run("flowtrain", f"from={first}", "trainer.steps=2", "name=second")
    assert code == 0, err
    assert len(json.loads((tmp_path / "outputs/second/result.json").read_text())["mode_shares"]) == 3
    code, _, err = run("flowtrain", f"from={first}", "target=gaussian_mixture", "trainer.steps=2", "name=third")
    assert code == 0, err
    assert len(json.loads((tmp_path / "outputs/third/result.json").read_text())["mode_shares"]) == 40
    code, _, err = run("flowtrain", f"from={first}", "target.n_modes=5", "trainer.steps=2", "name=fourth")
    assert code == 0, err
    fourth = checkpoint.load(tmp_path / "outputs/fourth/checkpoints/last.pt")["config"]["target"]
    assert (fourth["n_modes"], fourth["std"]) == (5, 3.0)
    assert len(json.loads((tmp_path / "outputs/fourth/result.json").read_text())["mode_shares"]) == 5


def test_from_refuses_keys_of_a_target_for_a_run_without_one(run: Run, tmp_path: Path) -> None:
    path = npy(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(200, 2)))
    keys = ["data=array", f"data.path={path}", "model=affine", "trainer.steps=2", "trainer.plot_every=null"]
    code, _, err = run("flowtrain", *keys, "name=first")
    assert code == 0, err
    code, _, err = run("flowtrain", f"from={tmp_path / 'outputs/first'}", "target.std=3.0")
    assert code == 2
    assert "target=funnel" in err


def test_initial_distribution_that_is_infinite_is_refused() -> None:
    with pytest.raises(NonFiniteError, match=r"target\.loc"):
        small_fit(banana, 2, types=["positive", "real"], loc=1e5)


def test_module_in_the_working_directory_needs_trust(run: Run, tmp_path: Path) -> None:
    (tmp_path / "module_of_a_user.py").write_text("def log_density(x):\n    return -x.square().sum(1)\n")
    keys = ["target=custom", "target._target_=module_of_a_user.log_density", "target.dim=2", "trainer.steps=1"]
    code, _, err = run("flowtrain", *keys)
    assert code == 2
    assert "trust=[module_of_a_user]" in err
