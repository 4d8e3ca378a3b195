"""Brings the contents of checkpoints of earlier versions up to date: renamed classes, renamed and missing keys."""

from collections.abc import Mapping
from typing import Any

# the `_target_` paths of earlier versions, and where the same object is now
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
    "flowtrain.regularizers.Regularizer": "flowtrain.bijections.continuous.Regularizer",
    "flowtrain.solvers.ode_solver": "flowtrain.ode.ode_solver",
}


def upgraded(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a checkpoint as the current version writes them."""
    config = {group: _renamed(keys) for group, keys in checkpoint["config"].items()}
    return {**checkpoint, "config": {**config, "data": _data(config["data"])}}


def _renamed(keys: Any) -> Any:
    if isinstance(keys, dict) and keys.get("_target_") in RENAMED:
        return {**keys, "_target_": RENAMED[keys["_target_"]]}
    return keys


def _data(data: dict[str, Any]) -> dict[str, Any]:
    """Adds the keys that data=array did not have, with the values that mean the same as before."""
    if data.get("_target_") != "flowtrain.data.tables.array.ArrayData":
        return data
    # older flows over tables started at a standard normal
    data = {"gaussian_start": False, **data}
    if "header" not in data:
        # older versions kept unnamed index columns, and all samples in float32
        columns = ["0:"] if data.get("columns") is None else data["columns"]
        data |= {"columns": columns, "header": None, "decimal": None, "center": False}
    return data
