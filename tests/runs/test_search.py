"""model=auto: successive halving, stacking, resume, and refused settings."""

import json
import math
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run

import flowtrain
from flowtrain.models.ensemble import SPARSE_LOSS, Ensemble
from flowtrain.runs.compose import compose
from flowtrain.runs.fit import fit
from flowtrain.runs.search import Search, trimmed_mean
from flowtrain.training import checkpoint
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import ConfigError, DataError, SolverError

# no time limit; with so few rows, nsf and maf have small networks
STEPS = {"trainer.steps": 12, "trainer.time_limit": None, "trainer.val_every": 6, "trainer.log_every": 6}
FLOWS = ["nsf", "maf", "realnvp"]


@pytest.fixture
def clusters() -> np.ndarray:
    """Returns rows of two clusters, (240, 3), which no single Gaussian fits.

    With 2 columns, evaluations would integrate the density, which takes longer.
    """
    rng = np.random.default_rng(0)
    return rng.normal(size=(240, 3)) * 0.3 + np.where(rng.random((240, 1)) < 0.5, -2.0, 2.0)


def fit_search(x: Any, candidates: list[str] | None = None, **named: Any) -> Any:
    keys = {**STEPS, **({} if candidates is None else {"model.candidates": candidates}), **named.pop("overrides", {})}
    return fit(x, progress=False, overrides=keys, **named)


def search_state(run_dir: Path) -> dict[str, Any]:
    state = json.loads((run_dir / "search/search.json").read_text())
    for candidate in state["candidates"]:
        del candidate["seconds"]
    return {"stacks": state["stacks"], "candidates": state["candidates"]}


@pytest.mark.slow
def test_stack_has_the_lowest_validation_nll(clusters: np.ndarray, tmp_path: Path) -> None:
    flow = fit_search(clusters, ["affine", "mixture", *FLOWS], run_dir=tmp_path / "r", seed=3)
    state = search_state(tmp_path / "r")
    nll = {c["name"]: c["nll"] for c in state["candidates"]}
    weight = {c["name"]: c["weight"] for c in state["candidates"]}
    assert {"affine", "mixture", *FLOWS} <= nll.keys()
    assert sum(weight.values()) == pytest.approx(1)
    stacks = [*state["stacks"].values()]
    # the final stack drops members that gain less than SPARSE_LOSS each
    assert stacks[-1] <= min(nll.values()) + len(nll) * SPARSE_LOSS
    assert all(after <= before + len(nll) * SPARSE_LOSS for before, after in pairwise(stacks))
    # two of the three flows are trained to the last stage
    assert sorted(c["stage"] for c in state["candidates"] if c["name"] in FLOWS) == [1, 2, 2]
    assert [c["steps"] for c in state["candidates"] if c["name"] in FLOWS and c["stage"] == 1] == [2]
    # the returned flow is the saved checkpoint and has the reported validation NLL
    val = torch.tensor(clusters[flow.record.held_out["val"]], dtype=torch.float32)
    assert -flow.log_prob(val).double().mean().item() == pytest.approx(stacks[-1], abs=1e-4)
    again = flowtrain.load(tmp_path / "r")
    assert torch.equal(again.log_prob(val), flow.log_prob(val))
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert result["val_nll"] == stacks[-1]
    if isinstance(flow, Ensemble):
        assert {m["path"]: m["weight"] for m in result["members"]} == {k: w for k, w in weight.items() if w > 0}


@pytest.mark.slow
def test_continued_search_gives_the_same_flow(
    clusters: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    trained: list[tuple[str, int]] = []
    train, stop_at = Search._train, [("maf", 1)]

    def recording(self: Search, candidate: Any, stage: int, seconds: float | None) -> None:
        if [(candidate.name, stage)] == stop_at:
            stop_at.clear()
            # the signal arrives while a candidate is trained
            step = Trainer.train_step

            def interrupted(trainer: Trainer) -> Any:
                if trainer.step == 1:
                    monkeypatch.setattr(Trainer, "train_step", step)
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(trainer)

            monkeypatch.setattr(Trainer, "train_step", interrupted)
        else:
            trained.append((candidate.name, stage))
        train(self, candidate, stage, seconds)

    monkeypatch.setattr(Search, "_train", recording)
    np.savetxt(tmp_path / "x.csv", clusters, delimiter=",")
    keys = [f"{key}={'null' if value is None else value}" for key, value in STEPS.items()]
    keys += ["data=array", f"data.path={tmp_path}/x.csv", "model.candidates=[affine,nsf,maf,realnvp]"]
    code, _, err = run("flowtrain", *keys, f"hydra.run.dir={tmp_path}/stopped")
    assert code == 128 + signal.SIGTERM, err
    assert (tmp_path / "stopped/checkpoints/best.pt").exists()
    code, _, err = run("flowtrain", f"resume={tmp_path}/stopped")
    assert code == 0, err
    once = list(trained)
    assert len(once) == len({*once}), "a stage was trained twice"
    trained.clear()
    code, _, err = run("flowtrain", *keys, f"hydra.run.dir={tmp_path}/whole")
    assert code == 0, err
    assert sorted(trained) == sorted(once)
    assert search_state(tmp_path / "stopped") == search_state(tmp_path / "whole")
    one, other = (checkpoint.load(tmp_path / name / "checkpoints/best.pt")["weights"] for name in ("stopped", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # a finished search is only evaluated
    trained.clear()
    code, _, _ = run("flowtrain", f"resume={tmp_path}/whole")
    assert (code, trained) == (0, [])


def test_failed_candidate_is_excluded(
    clusters: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fit_to_the_end = Trainer.fit

    def failing(self: Trainer, name: str | None = None) -> None:
        if name == "nsf":
            raise SolverError("no solution")
        fit_to_the_end(self, name)

    monkeypatch.setattr(Trainer, "fit", failing)
    flow = fit_search(clusters, ["affine", "nsf"])
    assert torch.isfinite(flow.log_prob(torch.zeros(1, 3)))
    assert any(record.levelname == "WARNING" and "nsf" in record.getMessage() for record in caplog.records)
    with pytest.raises(SolverError):
        fit_search(clusters, ["nsf"])


def test_time_limit_still_fits_the_first_candidates(clusters: np.ndarray) -> None:
    flow = fit(clusters, progress=False, overrides={"trainer.time_limit": 1e-3})
    gaussian = fit(clusters, model="affine", progress=False, steps=1)
    x = torch.tensor(clusters[flow.record.held_out["test"]], dtype=torch.float32)
    assert flow.record.stopped_by == "time limit"
    assert flow.log_prob(x).mean() > gaussian.log_prob(x).mean()


def test_search_without_run_directory_writes_nothing(
    clusters: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flow = fit_search(clusters, ["affine", "mixture"])
    assert not [*tmp_path.iterdir()]
    flow.save("flow.pt")
    x = torch.randn(5, 3)
    assert torch.allclose(flowtrain.load("flow.pt").log_prob(x), flow.log_prob(x))


@pytest.mark.slow
def test_search_with_labels_fits_conditional_models(clusters: np.ndarray, tmp_path: Path) -> None:
    label = (clusters[:, 0] > 0).astype(int)
    flow = fit_search(clusters, label=label, run_dir=tmp_path / "r", overrides={"trainer.steps": 3})
    assert flow.classes == 2
    names = {c["model"] for c in search_state(tmp_path / "r")["candidates"]}
    assert {"affine", "mixture"} < names
    for name in names:
        config = checkpoint.load(tmp_path / f"r/search/{name}/checkpoints/best.pt")["config"]
        assert config["model"]["conditional"]
    with pytest.raises(DataError):
        fit_search(clusters, overrides={"model.conditional": True})


def test_user_overrides_apply_to_every_candidate(clusters: np.ndarray, tmp_path: Path) -> None:
    keys = {"trainer.clip_norm": 0.123, "solver": "tsit5", "solver.rtol": 1e-3}
    fit_search(clusters, ["realnvp", "ffjord"], run_dir=tmp_path / "r", overrides={**keys, "trainer.steps": 2})
    for name in ("realnvp", "ffjord"):
        config = checkpoint.load(tmp_path / f"r/search/{name}/checkpoints/last.pt")["config"]
        assert config["trainer"]["clip_norm"] == 0.123
        assert config["trainer"]["steps"] == 2
    assert (config["solver"]["name"], config["solver"]["rtol"]) == ("tsit5", 1e-3)
    # the other keys come from the recipe
    assert config["model"] == {**compose({"model": "ffjord", "data": "array"}).config["model"], **config["model"]}


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.hidden": [8]},
        {"model.candidates": ["nope"]},
        {"model.candidates": []},
        {"model.candidates": ["auto"]},
        {"objective": "flow_matching"},
        {"trainer.steps": 0},
        {"trainer.time_limit": -1},
        {"time_budget": "abc"},
        {"time_budget": -1},
        {"trainer.lr": -1},
        {"model.conditional": "perhaps"},
    ],
)
def test_invalid_settings_are_refused_before_training(
    clusters: np.ndarray, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        fit(clusters, model="auto", progress=False, run_dir=tmp_path / "r", overrides=overrides)
    assert not (tmp_path / "r").exists()


def test_foreign_search_directory_is_refused(clusters: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search/mine.txt").write_text("mine")
    for text in ("{}", '{"candidates": [], "stacks": {}}'):
        with pytest.raises(ConfigError):
            fit_search(clusters, ["affine"], run_dir=tmp_path)
        (tmp_path / "search/search.json").write_text(text)
    with pytest.raises(ConfigError):
        fit_search(clusters, ["affine"], run_dir=tmp_path)
    assert (tmp_path / "search/mine.txt").read_text() == "mine"
    # leftovers of a search that was killed before its first checkpoint do not block a new search
    (tmp_path / "r/search/nsf/checkpoints").mkdir(parents=True)
    (tmp_path / "r/search/search.json").write_text('{"candidates": [], "stacks": {}}')
    fit_search(clusters, ["affine"], run_dir=tmp_path / "r")
    assert not (tmp_path / "r/search/nsf").exists()


@pytest.mark.parametrize(
    ("arguments", "is_search"),
    [
        (["data=array"], True),
        (["data=array", "model.candidates=[affine]"], True),
        (["data=array", "model=affine"], False),
        (["data=array", "objective=flow_matching"], False),
        (["data=moons"], False),
    ],
)
def test_flowtrain_searches_tables_by_default(arguments: list[str], is_search: bool, run: Run) -> None:
    code, out, err = (
        run("flowtrain", *arguments, "data.path=x.csv", "--cfg", "job")
        if "data=array" in arguments
        else run("flowtrain", *arguments, "--cfg", "job")
    )
    assert code == 0, err
    assert ("name: auto" in out) == is_search


def test_search_runs_form_an_ensemble(clusters: np.ndarray, tmp_path: Path, run: Run) -> None:
    np.save(tmp_path / "x.npy", clusters)
    keys = [f"{key}={'null' if value is None else value}" for key, value in STEPS.items()]
    keys += ["data=array", f"data.path={tmp_path}/x.npy", "model.candidates=[affine,mixture]", "seed=0,1"]
    code, _, err = run("flowtrain", "-m", *keys, f"hydra.sweep.dir={tmp_path}/sweep")
    assert code == 0, err
    code, _, err = run("floweval", f"ckpt={tmp_path}/sweep")
    assert code == 0, err
    members = json.loads((tmp_path / "sweep/eval.json").read_text())["members"]
    runs = [flowtrain.load(tmp_path / f"sweep/{i}") for i in range(2)]
    whole = flowtrain.load(tmp_path / "sweep")
    assert sum(m["weight"] for m in members) == pytest.approx(1)
    x = torch.randn(6, 3)
    log_p = torch.stack([one.log_prob(x) for one in runs])
    assert ((whole.log_prob(x) >= log_p.amin(0) - 1e-4) & (whole.log_prob(x) <= log_p.amax(0) + 1e-4)).all()


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, step: int, number: int) -> None:
    """Sends the signal `number` once, at `step` of the candidate `name`."""
    train, take = Search._train, Trainer.train_step
    training = [""]

    def recording(self: Search, candidate: Any, stage: int, seconds: float | None) -> None:
        training[0] = candidate.name
        train(self, candidate, stage, seconds)

    def interrupted(trainer: Trainer) -> Any:
        if training[0] == name and trainer.step == step:
            training[0] = ""
            monkeypatch.setattr(Trainer, "train_step", take)
            os.kill(os.getpid(), number)
        return take(trainer)

    monkeypatch.setattr(Search, "_train", recording)
    monkeypatch.setattr(Trainer, "train_step", interrupted)


def command_line(x: np.ndarray, folder: Path, candidates: str, **keys: Any) -> list[str]:
    np.savetxt(folder / "x.csv", x, delimiter=",")
    chosen = {**STEPS, **{key.replace("__", "."): value for key, value in keys.items()}}
    given = [f"{key}={'null' if value is None else value}" for key, value in chosen.items()]
    return ["flowtrain", *given, "data=array", f"data.path={folder}/x.csv", f"model.candidates={candidates}"]


def test_search_stopped_in_its_first_candidate_resumes(
    clusters: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    command = command_line(clusters, tmp_path, "[nsf]")
    interrupt(monkeypatch, "nsf", 7, signal.SIGTERM)
    code, _, err = run(*command, f"hydra.run.dir={tmp_path}/r")
    assert code == 128 + signal.SIGTERM, err
    code, _, err = run(*command, f"hydra.run.dir={tmp_path}/r")
    assert code == 2, err
    code, _, err = run("flowtrain", f"resume={tmp_path}/r")
    assert code == 0, err
    code, _, err = run(*command, f"hydra.run.dir={tmp_path}/whole")
    assert code == 0, err
    assert search_state(tmp_path / "r") == search_state(tmp_path / "whole")


def test_interrupted_fit_returns_the_best_flow_so_far(clusters: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, "nsf", 7, signal.SIGINT)
    flow = fit_search(clusters, ["nsf"])
    assert torch.isfinite(flow.log_prob(torch.zeros(1, 3)))
    assert flow.record.stopped_by == "SIGINT"


def test_search_refuses_to_resume_with_changed_data(clusters: np.ndarray, tmp_path: Path, run: Run) -> None:
    code, _, err = run(*command_line(clusters, tmp_path, "[affine]"), f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    before = (tmp_path / "r/result.json").read_text()
    np.savetxt(tmp_path / "x.csv", clusters[:200], delimiter=",")
    code, _, err = run("flowtrain", f"resume={tmp_path}/r")
    assert code == 2, err
    assert (tmp_path / "r/result.json").read_text() == before


@pytest.mark.slow
def test_resume_with_more_time_skips_damaged_candidates(clusters: np.ndarray, tmp_path: Path, run: Run) -> None:
    keys = {"trainer__steps": "auto", "trainer__time_limit": 0.3}
    code, _, err = run(*command_line(clusters, tmp_path, "[affine,nsf,maf]", **keys), f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    first = search_state(tmp_path / "r")
    for path in (tmp_path / "r/search").glob("maf/checkpoints/*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    code, _, err = run("flowtrain", f"resume={tmp_path}/r", "trainer.time_limit=4")
    assert code == 0, err
    steps = [{c["name"]: c["steps"] for c in state["candidates"]} for state in (first, search_state(tmp_path / "r"))]
    assert steps[1]["nsf"] > steps[0].get("nsf", 0)
    # the ensemble is computed again from all candidates
    last = json.loads((tmp_path / "r/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == sum(steps[1].values())


def test_damaged_search_state_is_refused(clusters: np.ndarray, tmp_path: Path, run: Run) -> None:
    code, _, err = run(*command_line(clusters, tmp_path, "[affine]"), f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    path = tmp_path / "r/search/search.json"
    state = json.loads(path.read_text())
    state["candidates"][0]["stage"] = "x"
    for text in (json.dumps(state), "[]", ""):
        path.write_text(text)
        code, _, err = run("flowtrain", f"resume={tmp_path}/r")
        assert (code, "Traceback" in err) == (2, False), err
    code, _, err = run("floweval", f"ckpt={tmp_path}/r")
    assert code == 0, err


def test_trimmed_mean_of_integer_weights_equals_the_mean_of_repeated_rows() -> None:
    log_p, k = torch.randn(500), torch.randint(0, 4, (500,))
    assert trimmed_mean(log_p, k / 3.0) == pytest.approx(trimmed_mean(log_p.repeat_interleave(k)), abs=1e-2)
    expected = log_p.sort(descending=True).values[: math.ceil(0.99 * 500)].mean()
    assert trimmed_mean(log_p) == pytest.approx(float(expected))
    log_p[log_p.argmin()] = -math.inf
    assert math.isfinite(trimmed_mean(log_p))


def test_search_with_weights_stacks_by_weighted_validation_rows(clusters: np.ndarray, tmp_path: Path) -> None:
    """The weights leave one cluster, which a Gaussian fits."""
    weights = np.where(clusters[:, 0] > 0, 1.0, 1e-6)
    np.save(tmp_path / "w.npy", np.column_stack([clusters, weights]))
    keys = {"data.weights": 3, "model.candidates": ["affine", "mixture"], **STEPS}
    flow = fit(tmp_path / "w.npy", run_dir=tmp_path / "r", progress=False, overrides=keys)
    state = search_state(tmp_path / "r")
    assert all(c["nll_stderr"] > 0 for c in state["candidates"])
    samples = flow.sample(200)
    assert float((samples[:, 0] > 0).double().mean()) > 0.9
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert result["n_effective"] < result["n"]
    signed = {**keys, "data.signed_weights": True}
    with pytest.raises(ConfigError, match=r"data\.signed_weights"):
        fit(tmp_path / "w.npy", progress=False, overrides=signed)
