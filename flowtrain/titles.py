"""What a run is called in titles and messages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def title_of(config: Mapping[str, Any]) -> str:
    """Such as "ffjord on moons"; the user's own data go by their file's name.

    Example:
        >>> title_of({"model": {"name": "glow"}, "data": {"name": "array", "path": "some/where/mine.npy"}})
        'glow on mine.npy'
    """
    return f"{name_of(config['model'])} on {data_name(config)}"


def data_name(config: Mapping[str, Any]) -> str:
    """Of a data set; the user's own data go by their file's."""
    path = config["data"].get("path")
    return Path(path).name if path else name_of(config["data"])


def name_of(group: Mapping[str, Any]) -> str:
    """The name of a group's choice, or of what it builds."""
    return str(group.get("name") or group["_target_"].rpartition(".")[2])
