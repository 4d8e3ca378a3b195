"""`flowsample animate=true`: how samples come about, as GIF or MP4."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowtrain.build import build_data
from flowtrain.cli.files import check_outputs, paths_of, run_dir_of
from flowtrain.cli.opened import open_checkpoint
from flowtrain.errors import ConfigError
from flowtrain.evaluation import check_fits
from flowtrain.pictures import animate, check_animated
from flowtrain.plots import KINDS, can_write_mp4


def write_animation(
    own: Mapping[str, Any],
    overrides: Sequence[str],
    n: int | None,
    seed: int,
    temperature: float,
    label: int | None,
) -> int:
    """The way of n samples from the base to the data, beside the density of two columns; the exit code.

    Raises:
        ConfigError: a flow that no animation shows, or a file that cannot be written here.
        DataError: the data, which give the limits, are not to be had.
    """
    given = written(own["out"])
    opened = open_checkpoint(own, overrides)
    flow = opened.flow
    check_animated(flow)
    flow.labels(label if flow.classes is None or label is not None else 0, torch.empty(1, 0, device=flow.like.device))
    out = run_dir_of(opened.path) / "animation.gif"
    paths = [given] if given else [out, *([out.with_suffix(".mp4")] if can_write_mp4() else [])]
    check_outputs(paths, [opened.path, *paths_of(opened.config["data"])])
    data = build_data(opened.config)
    check_fits(flow, data)
    title = opened.titled("" if label is None else f"class {label}")
    animate(flow, data, paths, title, n=n, seed=seed, temperature=temperature, label=label)
    print("\n".join(f"written to {path}" for path in paths))
    return 0


def written(out: Any) -> Path | None:
    """The file that `out` names; None where it is not given.

    Raises:
        ConfigError: one that cannot be written here.
    """
    if out is None or out == "":
        return None
    path = Path(str(out)).expanduser()
    if path.suffix not in KINDS:
        raise ConfigError(f"out={out}: an animation is written as {' or '.join(KINDS)}; give a name that ends so")
    if path.suffix == ".mp4" and not can_write_mp4():
        raise ConfigError(f"out={out}: there is no ffmpeg here to write it with; give a .gif, or install ffmpeg")
    return path
