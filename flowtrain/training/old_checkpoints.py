"""Converts checkpoints of earlier versions: renamed classes, renamed keys and missing keys."""

from collections.abc import Mapping
from typing import Any

# `_target_` paths of earlier versions and the present paths of the same objects
RENAMED = {
    "flowtrain.data.array.ArrayData": "flowtrain.data.tables.array.ArrayData",
    "flowtrain.data.checkerboard.Checkerboard": "flowtrain.data.toys.shapes.Checkerboard",
    "flowtrain.data.circles.Circles": "flowtrain.data.toys.shapes.Circles",
    "flowtrain.data.eight_gaussians.EightGaussians": "flowtrain.data.toys.shapes.EightGaussians",
    "flowtrain.data.moons.Moons": "flowtrain.data.toys.shapes.Moons",
    "flowtrain.data.pinwheel.Pinwheel": "flowtrain.data.toys.shapes.Pinwheel",
    "flowtrain.data.rings.Rings": "flowtrain.data.toys.shapes.Rings",
    "flowtrain.data.swissroll.SwissRoll": "flowtrain.data.toys.shapes.SwissRoll",
    "flowtrain.data.two_spirals.TwoSpirals": "flowtrain.data.toys.shapes.TwoSpirals",
    "flowtrain.objectives.hybrid.Hybrid": "flowtrain.objectives.flow_matching.Hybrid",
    "flowtrain.objectives.rectified.Rectified": "flowtrain.objectives.flow_matching.Rectified",
    "flowtrain.regularizers.Regularizer": "flowtrain.bijections.regularizers.Regularizer",
    "flowtrain.solvers.ode_solver": "flowtrain.ode.ode_solver",
}

# config keys of earlier versions, by group, and their present names
RENAMED_KEYS = {"model": {"positions": "positional_bias"}}
# renamed keys of the command line, such as model.positions
RENAMED_OVERRIDES = {f"{g}.{old}": f"{g}.{new}" for g, names in RENAMED_KEYS.items() for old, new in names.items()}
# renamed keys of `samples` in checkpoints
RENAMED_SAMPLES = {"discrete": "integer_valued"}


def key_of(override: str) -> str:
    """Returns the key of an override such as +model.positions=true."""
    return override.partition("=")[0].lstrip("+~")


def renamed_override(override: str) -> str:
    """Returns the override with the present name of its key."""
    start, equals, value = override.partition("=")
    key = key_of(override)
    return start.removesuffix(key) + RENAMED_OVERRIDES.get(key, key) + equals + value


def upgraded(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of a checkpoint as the current version writes them."""
    config = {group: _renamed(group, keys) for group, keys in checkpoint["config"].items()}
    content = {**checkpoint, "config": {**config, "data": _data(config["data"]), "solver": _solver(config["solver"])}}
    if isinstance(checkpoint.get("samples"), dict):
        content["samples"] = renamed(checkpoint["samples"], RENAMED_SAMPLES)
    return content


def renamed(keys: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the mapping with its keys renamed. If old and new name of a key are present, the new name is kept."""
    found = {names[k]: v for k, v in keys.items() if k in names}
    return {**found, **{k: v for k, v in keys.items() if k not in names}}


def _renamed(group: str, keys: Any) -> Any:
    if not isinstance(keys, dict):
        return keys
    if group in RENAMED_KEYS and str(keys.get("_target_")).startswith("flowtrain."):
        keys = renamed(keys, RENAMED_KEYS[group])
    target = keys.get("_target_")
    return {**keys, "_target_": RENAMED[target]} if isinstance(target, str) and target in RENAMED else keys


def _solver(solver: dict[str, Any]) -> dict[str, Any]:
    """Adds `warmup: 0`, because versions without this key did not warm up the tolerance."""
    return {"warmup": 0, **solver} if solver.get("_target_") == "flowtrain.ode.ode_solver" else solver


def _data(data: dict[str, Any]) -> dict[str, Any]:
    """Adds missing keys of data=array with the values that reproduce the behaviour of earlier versions."""
    if data.get("_target_") != "flowtrain.data.tables.array.ArrayData":
        return data
    # older versions initialized flows over tables at a standard normal, and refused missing values
    roles = {"context": None, "weights": None, "signed_weights": False, "id": None}
    data = {"gaussian_start": False, "missing": "refuse", "na": None, **roles, **data}
    if "header" not in data:
        # older versions kept unnamed index columns, and all samples in float32
        columns = ["0:"] if data.get("columns") is None else data["columns"]
        data |= {"columns": columns, "header": None, "decimal": None, "center": False}
    return data
