"""`flowsample animate=true`: how samples come about, as GIF or MP4."""

from collections.abc import Mapping, Sequence
from typing import Any

from flowtrain.cli.files import check_outputs, paths_of, run_dir_of, written_as
from flowtrain.cli.opened import open_checkpoint
from flowtrain.evaluation import check_fits
from flowtrain.pictures import animate, check_animated
from flowtrain.plots import KINDS, can_write_mp4, check_writable
from flowtrain.status import status


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
        FlowtrainError: a label that the flow does not have.
        NonFiniteError: samples that are no numbers, of which nothing is written.
    """
    given = written_as("out", own["out"], *KINDS)
    if given is not None:
        check_writable(given)
    opened = open_checkpoint(own, overrides)
    flow = opened.flow
    check_animated(flow, n)
    # refused before anything is read
    if label is not None:
        flow.check_label(label)
    out = run_dir_of(opened.path) / "animation.gif"
    paths = [given] if given else [out, *([out.with_suffix(".mp4")] if can_write_mp4() else [])]
    check_outputs(paths, [opened.path, *paths_of(opened.config["data"])])
    with status("reading the data"):
        data = opened.build()
    check_fits(flow, data)
    title = opened.titled("" if label is None else f"class {label}")
    animate(flow, data, paths, title, n=n, seed=seed, temperature=temperature, label=label)
    print("\n".join(f"written to {path}" for path in paths))
    return 0
