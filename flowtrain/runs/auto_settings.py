"""Default settings chosen from the number of training rows and columns: the value `auto` in a recipe.

A recipe tuned on ten thousand rows overfits a hundred rows. A recipe for vectors is far too large for images. If a
recipe sets a key to `auto`, its value is chosen after the data have been read. The log and the checkpoints contain that
value. A key with another value on the command line is never changed.
"""

from collections.abc import Mapping
from typing import Any

from flowtrain.utils.errors import ConfigError

AUTO = "auto"
# keys for which the model itself accepts `auto`
OWN_AUTO = ("trace", "eval_trace")
# keys of model=mixture that are chosen by fits to the data, see `flowtrain.runs.components`
FROM_DATA = ("components", "covariance", "prior")
# the key that is chosen by the tails of the data, see `flowtrain.runs.tails`
FROM_TAILS = ("df",)

Groups = dict[str, dict[str, Any]]


# For vectors: the smallest number of training rows of each tier, and the values of `auto` in the tier. The values for
# 5,000 rows and more were chosen on gas's validation set. The others were chosen on optdigits' validation set and the
# tables of scripts/small_tables.py
_MANY, _SOME, _FEW, _TINY = 5000, 1000, 100, 0
_COUPLINGS: dict[int, Groups] = {
    _MANY: {
        "model": {"hidden": [64, 64], "dropout": 0.0},
        "trainer": {"steps": 8000, "lr": 0.005, "weight_decay": 0.0, "ema": 0.999, "val_every": 100},
    },
    _SOME: {
        "model": {"hidden": [64, 64], "dropout": 0.2},
        "trainer": {"steps": 8000, "lr": 0.002, "weight_decay": 1e-4, "ema": 0.999, "val_every": 50},
    },
    _FEW: {
        "model": {"hidden": [16, 16], "dropout": 0.2},
        "trainer": {"steps": 4000, "lr": 0.001, "weight_decay": 1e-3, "ema": 0.99, "val_every": 20},
    },
    # fewer than 100 rows determine little beyond a Gaussian, and their few validation rows cannot rank flows reliably
    _TINY: {
        "model": {"hidden": [8], "dropout": 0.5, "cap": 0.2},
        "trainer": {"steps": 300, "lr": 2e-4, "weight_decay": 1e-2, "ema": 0.99, "val_every": 20},
    },
}
_DEPTHS: dict[str, dict[int, Groups]] = {
    "realnvp": {n: {"model": {"layers": layers}} for n, layers in ((_MANY, 16), (_SOME, 8), (_FEW, 4), (_TINY, 2))},
    "glow": {n: {"model": {"steps": steps}} for n, steps in ((_MANY, 8), (_SOME, 4), (_FEW, 2), (_TINY, 1))},
}
# For nsf and maf. `hidden` has the width of each residual block of two layers. The values for a hundred rows and more
# were chosen on validation sets of the development tables, see "Small tables" in scripts/bench/README.md
_RESIDUAL: dict[int, Groups] = {
    _MANY: {
        "model": {"layers": 6, "hidden": [64], "dropout": 0.0},
        "trainer": {"steps": 8000, "lr": 0.005, "weight_decay": 0.0, "ema": 0.999, "val_every": 100},
    },
    _SOME: {
        "model": {"layers": 6, "hidden": [64], "dropout": 0.2},
        "trainer": {"steps": 8000, "lr": 0.002, "weight_decay": 1e-4, "ema": 0.999, "val_every": 50},
    },
    _FEW: {
        "model": {"layers": 6, "hidden": [16], "dropout": 0.0},
        "trainer": {"steps": 4000, "lr": 0.001, "weight_decay": 1e-3, "ema": 0.99, "val_every": 20},
    },
    _TINY: {
        "model": {"layers": 1, "hidden": [8], "dropout": 0.5, "cap": 0.2},
        "trainer": {"steps": 300, "lr": 2e-4, "weight_decay": 1e-2, "ema": 0.99, "val_every": 20},
    },
}
# From 1,000 rows on, nsf and maf have dropout only with fewer rows per column than this. Coupling flows also have
# dropout below 5,000 rows. Validation NLL on landsat (143 rows per column, 36 columns) with the settings of _MANY and
# of _SOME: realnvp -5.03 and -5.24, nsf -4.81 and -4.93
_DENSE = 200
# with _DENSE to _DENSE_COUPLINGS rows per column, flows with couplings have a dropout of 0.1, and affine couplings have
# a smaller cap. Validation NLL after 30 s without and with these settings: realnvp on pendigits -22.65 and -23.10
# (seed 0), -22.99 and -23.53 (seed 1), glow on pendigits -20.89 and -21.25. nsf without and with dropout: pendigits
# (344 rows per column) -30.82 and -31.59, 3,000 rows of gas (375) -5.83 and -6.05, 2,000 rows of annthyroid (333)
# -19.29 and -19.28, mammography (1,046) -4.29 and -4.11. On pendigits, maf has -31.49 and -30.87
_DENSE_COUPLINGS = 600
_DENSE_CAP = 0.35
_FIELDS: dict[int, Groups] = {
    _MANY: {"model": {"hidden": [64, 64, 64]}, "trainer": {"lr": 0.01, "weight_decay": 0.0, "val_every": 50}},
    _SOME: {"model": {"hidden": [64, 64, 64]}, "trainer": {"lr": 0.01, "weight_decay": 1e-4, "val_every": 50}},
    _FEW: {"model": {"hidden": [32, 32]}, "trainer": {"lr": 0.002, "weight_decay": 1e-3, "val_every": 20}},
    _TINY: {"model": {"hidden": [16]}, "trainer": {"lr": 2e-4, "weight_decay": 1e-2, "val_every": 20}},
}
# Settings of coupling flows for any number of rows. A cap of 0.5 is as good as a cap of 2 on gas. With it, 16
# couplings scale by at most exp(8). The patience is long because the validation NLL of a table may rise and then fall
# again
_BOUNDED: dict[str, Any] = {"positional_bias": False, "cap": 0.5, "input_bound": 5.0}
_COUPLING_TRAINER: dict[str, Any] = {"lr_decay": "constant", "clip_norm": 5.0, "patience": 10}
# after a minute, the validation NLL of nsf on gas is -7.2 with cosine decay from 0.005, and -6.2 at a constant 0.002
_RESIDUAL_TRAINER = {**_COUPLING_TRAINER, "lr_decay": "cosine"}
_SPLINES: dict[str, Any] = {"mixing": "linear", "bins": 8, "input_bound": 5.0}
_VECTORS: dict[str, Groups] = {
    "realnvp": {"model": {"mixing": "permutation", **_BOUNDED}, "trainer": _COUPLING_TRAINER},
    "glow": {"model": _BOUNDED, "trainer": _COUPLING_TRAINER},
    "nsf": {"model": _SPLINES, "trainer": _RESIDUAL_TRAINER},
    "maf": {"model": {"transform": "spline", "cap": 0.5, **_SPLINES}, "trainer": _RESIDUAL_TRAINER},
    # data-dependent initialization already fits affine and mixture. On seven development tables, 200 steps of affine
    # lower the validation NLL by at most 0.1 nats (Wilt), and 200 steps of a mixture by less than 0.02
    "affine": {"trainer": {"steps": 100, "lr": 0.001, "val_every": 50, "patience": 2}},
    "mixture": {"trainer": {"steps": 20, "lr": 1e-4, "val_every": 20, "patience": 2}},
    "conditional mixture": {"trainer": {"steps": 3000, "lr": 0.001, "val_every": 50, "patience": 10}},
    "ffjord": {
        "model": {"field": "time_embedding", "positional_bias": False},
        "trainer": {"steps": 600, "lr_decay": "cosine", "ema": 0.99, "clip_norm": 5.0, "patience": 3},
    },
}
# as in recipe/*_mnist.yaml. clip_norm is large, because the gradient of an NLL in nats per image has a norm of hundreds
_IMAGE_TRAINER: dict[str, Any] = {
    "steps": 3000,
    "batch_size": 64,
    "optimizer": "adam",
    "lr": 0.004,
    "lr_decay": "cosine",
    "weight_decay": 0.0,
    "ema": 0.999,
    "clip_norm": 1000.0,
    "val_every": 200,
    "patience": 5,
}
_UNBOUNDED: dict[str, Any] = {"positional_bias": True, "cap": 2.0, "dropout": 0.0, "input_bound": None}
_IMAGES: dict[str, Groups] = {
    "affine": {"trainer": {"steps": 500, "batch_size": 512, "lr": 0.001, "val_every": 100, "patience": 5}},
    "mixture": {"trainer": {"steps": 200, "batch_size": 512, "lr": 1e-4, "val_every": 50, "patience": 2}},
    "conditional mixture": {"trainer": {"steps": 1000, "batch_size": 512, "lr": 0.001, "val_every": 50, "patience": 5}},
    "realnvp": {
        "model": {"layers": 2, "hidden": [32], "mixing": "alternate", **_UNBOUNDED},
        "trainer": _IMAGE_TRAINER,
    },
    # Muon trains the 1x1 convolutions, see "Muon for flows of images" in scripts/bench/README.md
    "glow": {
        "model": {"steps": 4, "hidden": [64, 64], **_UNBOUNDED},
        "trainer": {**_IMAGE_TRAINER, "optimizer": "muon", "lr": 0.008},
    },
    "ffjord": {
        "model": {"field": "concat", "hidden": [32, 32], "positional_bias": True},
        "trainer": {**_IMAGE_TRAINER, "steps": 900, "batch_size": 32, "lr": 0.01},
    },
}
# largest batch of vectors
_BATCH = 512
# Muon trains flows with couplings and autoregressive maps on tables with at least this number of training rows, or with
# more than this number of columns. On other tables it overfits, see "Optimizers of flows on tables" in
# scripts/bench/README.md
_MUON_ROWS, _MUON_COLUMNS = 10_000, 16
# the learning rate of Muon with the other settings of _SOME
_MUON_LR = 0.0035


def resolve_auto(
    config: Mapping[str, Any], rows: int | None, event_shape: tuple[int, ...], context: bool = False
) -> dict[str, Any]:
    """Returns the config with each `auto` in `model` and `trainer` replaced by its value.

    Args:
        rows: the number of training rows; None for endless data.
        context: whether the data have context columns.

    Raises:
        ConfigError: `auto` for a key that has no automatic value.
    """
    name = str(config["model"].get("name"))
    # EM fits a mixture, but not the network of a conditional mixture
    conditional = context or config["model"].get("conditional")
    values = _values("conditional mixture" if name == "mixture" and conditional else name, rows, event_shape)
    groups = {group: dict(config[group]) for group in ("model", "trainer")}
    for group, keys in groups.items():
        for key, value in keys.items():
            if value != AUTO or (group == "model" and key in OWN_AUTO + FROM_DATA + FROM_TAILS):
                continue
            if len(event_shape) > 1 and not values:
                raise ConfigError(
                    f"model={config['model'].get('name')} is for vectors, but the samples are images of shape "
                    f"{event_shape}: choose realnvp, glow or ffjord"
                )
            if key not in values.get(group, {}):
                raise ConfigError(
                    f"{group}.{key}=auto: this key has no automatic value for model={config['model'].get('name')}; "
                    "give a value"
                )
            keys[key] = values[group][key]
    return {**config, **groups}


def _small_steps(lr: float, rows: int, columns: int) -> dict[str, Any]:
    """Returns trainer settings for models with a d x d matrix that starts at a shrunk Gaussian or a rotation.

    With few rows per matrix entry, the maximum likelihood estimate is worse than the initial matrix. Every step of Adam
    changes all entries by about the learning rate, which is therefore smaller.
    """
    share = min(1.0, rows / (4 * columns**2))
    return {"lr": float(f"{lr * share:.2g}"), **({"val_every": 20} if share < 1 else {})}


def _splines(rows: int, columns: int) -> dict[str, Any]:
    """Returns model settings of nsf and maf that depend on rows / d^2 and on d.

    Matrices mix the columns only if there are many rows for each matrix entry. The measured validation NLLs are:

    - after 20 s with matrices that start at permutations, with fixed permutations, and with matrices that start at
      rotations: -6.12, -2.69 and -6.00 on gas (10,000 rows, 8 columns), and -3.55, -3.52 and -2.72 on mammography
      (6,278 rows, 6 columns)
    - after 700 steps with the first two: -27.4 and -28.0 on pendigits (5,496 rows, 16 columns)
    - after 60 s on optdigits (3,058 rows, 62 columns): 119 with rotations and 8 bins, 97 with permutations and 4 bins

    One or two columns need many bins: the NLL on flood (3,888 rows, 2 columns) is 9.21 with 8 bins and 9.02 with 32.
    """
    per_entry = rows / columns**2
    if columns <= 2:
        return {"bins": 32 if rows >= _SOME else 16}
    return {**({"mixing": "permutation"} if per_entry < 40 else {}), **({"bins": 4} if per_entry < 4 else {})}


def _tier(name: str, rows: int | None, columns: int) -> int:
    """Returns the tier for dropout, weight decay and learning rate. From 1,000 rows on, rows / columns matters too."""
    tier = _by_rows(rows)
    if rows is None or tier not in (_MANY, _SOME):
        return tier
    if rows < _DENSE * columns:
        return _SOME
    return _MANY if name in ("nsf", "maf") else tier


def _by_rows(rows: int | None) -> int:
    return next(least for least in (_MANY, _SOME, _FEW, _TINY) if rows is None or rows >= least)


def _values(name: str, rows: int | None, event_shape: tuple[int, ...]) -> Groups:
    """Returns the values of `auto` by group and key."""
    if len(event_shape) > 1:
        return _IMAGES.get(name, {})
    tier, by_rows = _tier(name, rows, event_shape[0]), _by_rows(rows)
    parts = [
        _VECTORS.get(name, {}),
        _COUPLINGS[tier] if name in _DEPTHS else {},
        _DEPTHS.get(name, {}).get(by_rows, {}),
        _RESIDUAL[tier] if name in ("nsf", "maf") else {},
        _FIELDS[by_rows] if name == "ffjord" else {},
        {"trainer": {"batch_size": _BATCH if rows is None else min(_BATCH, rows)}},
    ]
    found = {g: {k: v for part in parts for k, v in part.get(g, {}).items()} for g in ("model", "trainer")}
    if name in ("realnvp", "glow", "nsf", "maf"):
        is_large = rows is None or rows >= _MUON_ROWS or event_shape[0] > _MUON_COLUMNS
        found["trainer"] |= {"optimizer": "muon" if is_large else "adam"}
        if is_large and tier == _SOME:
            found["trainer"]["lr"] = _MUON_LR
    has_couplings = name in ("nsf", "realnvp", "glow")
    if has_couplings and rows is not None and tier == _MANY and rows < _DENSE_COUPLINGS * event_shape[0]:
        found["model"] |= {"dropout": 0.1, **({} if name == "nsf" else {"cap": _DENSE_CAP})}
    if name in ("nsf", "maf") and rows is not None:
        found["model"] |= _splines(rows, event_shape[0])
    if rows is not None and (name == "affine" or (name == "glow" and tier in (_FEW, _TINY))):
        found["trainer"] |= _small_steps(found["trainer"]["lr"], rows, event_shape[0])
    return found
