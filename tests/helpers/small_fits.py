"""Fits of every model with the options of flowtrain, for tests of another device."""

from typing import Any

import numpy as np

import flowtrain

NSF = {"model.layers": 2, "model.hidden": [8], "model.bins": 4}
MAF = {"model.layers": 2, "model.hidden": [8]}
GLOW = {"model.steps": 2, "model.hidden": [8]}
FFJORD = {"model.hidden": [8], "solver.rtol": 1e-3}
DROPOUT = {"model.dropout": 0.3, "model.df": 5.0, "trainer.optimizer": "muon"}
TYPES = {"data.types": {"0": "circular(6.3)", "1": "integer"}}


def table(n: int = 120) -> np.ndarray:
    rng = np.random.default_rng(0)
    columns = [rng.uniform(0, 6.2, n), rng.integers(0, 4, n), rng.normal(size=n), rng.gamma(2.0, size=n)]
    return np.stack(columns, 1).astype(np.float32)


def fitted(case: str, device: str) -> Any:
    """Trains the flow of a case for a few steps."""
    model, overrides, named = CASES[case]
    overrides = {"trainer.batch_size": 32, "trainer.val_every": 4, "trainer.val_early": False, **overrides}
    named = {"steps": 4, **named}
    return flowtrain.fit(table(), model=model, device=device, progress=False, overrides=overrides, **named)


# the model, its settings, and the arguments of `flowtrain.fit`
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "affine": ("affine", {}, {}),
    "mixture": ("mixture", {"model.components": 3}, {}),
    "mixture-context": ("mixture", {"model.components": 3}, {"context": [2]}),
    "realnvp": ("realnvp", MAF, {}),
    "realnvp-dropout": ("realnvp", {**MAF, **DROPOUT}, {"weights": 3}),
    "realnvp-tf32": ("realnvp", {**MAF, "trainer.precision": "tf32", "trainer.accumulate": 2}, {}),
    "glow-dropout": ("glow", {**GLOW, **DROPOUT, "trainer.ema": None}, {}),
    "nsf": ("nsf", NSF, {}),
    "nsf-dropout": ("nsf", {**NSF, **DROPOUT}, {}),
    "nsf-bfloat16": ("nsf", {**NSF, "trainer.precision": "bfloat16"}, {"label": 1}),
    "nsf-types": ("nsf", {**NSF, **TYPES}, {}),
    "maf-dropout": ("maf", {**MAF, **DROPOUT, "trainer.clip_norm": 0.01}, {}),
    "maf-splines": ("maf", {**MAF, "model.transform": "spline", "model.mixing": "linear"}, {"context": [2, 3]}),
    "maf-types": ("maf", {**MAF, "model.transform": "spline", **TYPES}, {}),
    "ffjord": ("ffjord", FFJORD, {}),
    "ffjord-graphs": ("ffjord", {**FFJORD, "solver.cuda_graphs": True, "regularizer": "rnode"}, {"steps": 8}),
    "ffjord-types": ("ffjord", {**FFJORD, **TYPES, "objective": "flow_matching"}, {}),
    "ffjord-hybrid": ("ffjord", {**FFJORD, "objective": "hybrid", "objective.matching": 0.5}, {"context": [3]}),
}


def rows_of(case: str) -> tuple[np.ndarray, Any]:
    """Returns the samples of the first rows, and their context or labels."""
    named = CASES[case][2]
    rows = table()[:10]
    roles = [c for key, role in named.items() if key != "steps" for c in (role if isinstance(role, list) else [role])]
    x = np.delete(rows, roles, axis=1)
    if "label" in named:
        return x, rows[:, named["label"]].astype(np.int64)
    return x, rows[:, named["context"]] if "context" in named else None
