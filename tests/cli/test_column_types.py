"""A table with all column types goes from CSV through training, evaluation, scoring and sampling to CSV."""

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers import Evaluate, Run, Train

import flowtrain

pytestmark = pytest.mark.usefixtures("without_figures")

TYPES = "data.types={age: positive, p: interval(0,1), phase: circular(360), n: integer, colour: categorical}"
N = 300


def table() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "x": rng.normal(size=N),
            "age": rng.gamma(2, 10, N),
            "p": np.clip(rng.normal(0.5, 0.3, N), 0, 1),
            "phase": np.degrees(rng.vonmises(3, 2, N)) % 360,
            "n": rng.poisson(2, N),
            "colour": rng.choice(["red", "blue", "dark green"], N),
            "w": rng.uniform(0.5, 2, N),
        }
    )
    # each column has missing values
    at = pl.int_range(pl.len()) % 50
    return frame.with_columns(pl.when(at != i).then(pl.col(name)).alias(name) for i, name in enumerate(frame.columns))


@pytest.fixture
def run_dir(trained: Train, tmp_path: Path) -> str:
    table().write_csv(tmp_path / "t.csv")
    keys = ["data.missing=drop", "data.weights=w", "model.layers=2", "model.hidden=[8]", "model.bins=4"]
    return trained("model=nsf", "data=array", "data.path=t.csv", TYPES, *keys)


def test_mixed_table_goes_from_csv_to_csv(run_dir: str, tmp_path: Path, run: Run, evaluated: Evaluate) -> None:
    result = json.loads((tmp_path / run_dir / "result.json").read_text())
    assert math.isfinite(result["nll"])
    assert not [name for name, check in result["checks"].items() if check["passed"] is False and name != "baseline"]
    evaluated(run_dir, "data.path=t.csv", "scores=s.csv", name="eval-t.json")
    scores = pl.read_csv(tmp_path / "s.csv")["log_prob"]
    # weights are not needed for a score
    missing = table().select(pl.exclude("w")).null_count().sum_horizontal().item()
    assert scores.null_count() >= missing
    code, _, err = run("flowsample", f"ckpt={run_dir}", "n=500", "out=sampled.csv", "seed=1")
    assert code == 0, err
    sampled = pl.read_csv(tmp_path / "sampled.csv")
    assert sampled.columns == ["x", "age", "p", "phase", "n", "colour"]
    assert sampled["n"].dtype == pl.Int64
    assert sampled["n"].min() >= 0  # type: ignore[operator]
    assert set(sampled["colour"]) == {"red", "blue", "dark green"}
    for name, low, high in (("age", 0, math.inf), ("p", 0, 1), ("phase", 0, 360)):
        assert sampled[name].is_between(low, high).all()
    evaluated(run_dir, "data.path=sampled.csv", "scores=own.csv", name="eval-sampled.json")
    assert pl.read_csv(tmp_path / "own.csv")["log_prob"].is_finite().all()


def test_values_outside_of_a_range_score_minus_infinity(run_dir: str, tmp_path: Path, evaluated: Evaluate) -> None:
    inside = {"x": 0.0, "age": 5.0, "p": 0.5, "phase": 10.0, "n": 1, "colour": "red"}
    rows = [inside, *({**inside, **change} for change in ({"age": -1.0}, {"p": 1.1}, {"n": -1}, {"phase": 730.0}))]
    pl.DataFrame(rows).write_csv(tmp_path / "new.csv")
    evaluated(run_dir, "data.path=new.csv", "scores=s.csv", name="eval-new.json")
    scores = pl.read_csv(tmp_path / "s.csv")["log_prob"].to_list()
    assert [math.isfinite(score) for score in scores] == [True, False, False, False, True]


def test_unknown_categories_end_the_command_with_one_message(run_dir: str, tmp_path: Path, run: Run) -> None:
    table().drop_nulls().with_columns(colour=pl.lit("pink")).write_csv(tmp_path / "new.csv")
    code, _, err = run("floweval", f"ckpt={run_dir}", "data.path=new.csv", "scores=s.csv")
    assert code != 0
    assert "pink" in err
    assert "line 2" in err
    assert "Traceback" not in err


def test_models_without_circular_columns_are_refused(tmp_path: Path, run: Run) -> None:
    table().write_csv(tmp_path / "t.csv")
    keys = ["data=array", "data.path=t.csv", "data.columns=[phase,x]", "data.missing=drop"]
    code, _, err = run("flowtrain", "model=realnvp", *keys, "data.types={phase: circular(360)}")
    assert code != 0
    assert "realnvp" in err
    assert "phase" in err


def test_flow_of_a_run_has_its_types(run_dir: str, tmp_path: Path) -> None:
    flow = flowtrain.load(tmp_path / run_dir)
    assert [str(one) for one in flow.types] == [
        "real",
        "positive",
        "interval(0,1)",
        "circular(360)",
        "integer(0,inf)",
        "categorical",
    ]
    frame = table().drop_nulls().drop("w")
    codes = frame.with_columns(colour=pl.Series([flow.types[5].categories.index(c) for c in frame["colour"]]))
    # the columns of a frame are found by name
    log_p = []
    for rows in (frame.select(reversed(frame.columns)), codes.to_numpy()):
        # both calls draw the same noise
        torch.manual_seed(0)
        log_p.append(flow.log_prob(rows))
    np.testing.assert_allclose(*log_p, rtol=1e-4)
