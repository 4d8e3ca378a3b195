"""Chooses model.df=auto, the degrees of freedom of the base, by the tails of the training rows."""

from collections.abc import Mapping
from typing import Any

import torch

from flowtrain.data.base import Dataset
from flowtrain.data.types import circular_columns, on_line
from flowtrain.runs.auto_settings import AUTO
from flowtrain.runs.components import training_rows

# A table has heavy tails if at least the fraction SHARE of its values are more than FAR standard deviations from the
# mean of their column. For a normal distribution the fraction is 6e-7. See "Tails of the base" in
# scripts/bench/README.md
FAR, SHARE = 5.0, 2e-4
# the initial degrees of freedom of the base for a table with heavy tails
DF = 20.0


def resolve_df(config: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    """Returns the config with `df: auto` of the model replaced by DF for a table with heavy tails, else by None.

    Columns with a type are mapped to the real line first, as in the flow. Tables with circular columns get None, and
    so do images and endless data.
    """
    model = config["model"]
    if model.get("df") != AUTO:
        return dict(config)
    possible = len(data.event_shape) == 1 and not circular_columns(data.types)
    train = training_rows(data) if possible else None
    return {**config, "model": {**model, "df": DF if train is not None and _has_heavy_tails(train, data) else None}}


def _has_heavy_tails(train: torch.Tensor, data: Dataset) -> bool:
    rows = train.flatten(1).double().cpu()
    if data.types:
        rows = torch.from_numpy(on_line(data.types, rows.numpy()))
    std, mean = torch.std_mean(rows, 0, correction=0)
    return float(((rows - mean).abs() > FAR * std).double().mean()) >= SHARE
