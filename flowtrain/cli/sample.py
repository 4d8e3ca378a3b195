"""`flowsample`: draws samples from a checkpoint into a .npy file, or shows how they come about."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtrain.checks import flag, number, whole
from flowtrain.cli.animate import write_animation
from flowtrain.cli.arguments import split_own
from flowtrain.cli.files import check_outputs, paths_of, run_dir_of, written_as
from flowtrain.cli.messages import run_command
from flowtrain.cli.opened import Opened, open_checkpoint
from flowtrain.cli.quality import report_quality
from flowtrain.console import messages
from flowtrain.data.base import Dataset
from flowtrain.errors import ConfigError, DataError
from flowtrain.evaluation import check_fits, roundtrip_error, rows_of_checks
from flowtrain.files import write_npy
from flowtrain.pictures import draw
from flowtrain.scores import check_samples
from flowtrain.status import status

USAGE = """flowsample ckpt=RUN_DIR_OR_FILE [n=10000] [seed=0] [temperature=1.0] [label=7] [out=FILE.npy] [KEY=VALUE ...]
flowsample ckpt=RUN_DIR_OR_FILE animate=true [n=2000] [seed=0] [temperature=1.0] [label=7] [out=FILE.gif]
flowsample ckpt=RUN_DIR_OR_FILE quality=[1,2,4,8,16] [seed=0] [out=FILE.json]

  ckpt          a run directory (its best checkpoint) or a .pt file; the name may be left out: flowsample RUN_DIR
  n             how many samples; default: 10000, of images 100. Animated: 2000
                (at most 100000), of images 60 (200)
  seed          of the base noise
  temperature   factor on the base noise; 1 samples the density
  label         of a conditional model; default: classes by their frequency in training
  out           .npy file in data units, with pixels and counts as whole numbers; default: samples.npy in the run
                directory.
                Vectors of one or two columns and images come with a picture beside the data.
  log_scale     true: that picture shows densities by their logarithm, and so the tails
  animate       true: in place of samples, how they come about from the base, of two columns or images:
                animation.gif in the run directory, and animation.mp4 where there is an ffmpeg; or out=FILE.gif, .mp4
  quality       in place of samples, how near they come to test data by the number of steps, as in [1,2,4,8,16]:
                a table, quality.json and plots/quality.png
  device        auto (default), cpu, cuda or cuda:0
  trust         packages besides flowtrain that the checkpoint may build from: trust=[mypkg]

The solver can be changed, as in solver.rtol=1e-3 or solver=euler solver.steps=4."""

OWN: dict[str, Any] = {
    "ckpt": None,
    "n": None,
    "seed": 0,
    "temperature": 1.0,
    "label": None,
    "out": None,
    "log_scale": False,
    "animate": False,
    "quality": None,
    "device": "auto",
    "trust": [],
}


def main() -> None:
    """The console script: see USAGE."""
    with messages():
        run_command("flowsample", _command)


def _command() -> int:
    own, overrides = split_own(sys.argv[1:], OWN, USAGE)
    seed = whole("seed", own["seed"], least=0)
    temperature = number("temperature", own["temperature"], inclusive=True)
    log_scale, animate = flag("log_scale", own["log_scale"]), flag("animate", own["animate"])
    if animate and own["quality"] is not None:
        raise ConfigError("animate=true quality=...: these are two things; ask for one at a time")
    if log_scale and (animate or own["quality"] is not None):
        raise ConfigError("log_scale=true: is for the picture of samples; leave it out")
    if own["quality"] is not None:
        return report_quality(own, overrides, seed)
    n = None if own["n"] is None else whole("n", own["n"])
    label = None if own["label"] is None else whole("label", own["label"], least=0)
    if animate:
        return write_animation(own, overrides, n, seed, temperature, label)
    given = written_as("out", own["out"], ".npy")
    return write_samples(open_checkpoint(own, overrides), given, n, seed, temperature, label, log_scale)


def write_samples(
    opened: Opened,
    given: Path | None,
    n: int | None,
    seed: int,
    temperature: float,
    label: int | None,
    log_scale: bool,
) -> int:
    """Samples into a .npy file, and a picture of them; the exit code.

    Raises:
        ConfigError: a place that cannot be written to.
        FlowtrainError: labels that the flow does not have.
        NonFiniteError: samples that are no numbers, of which nothing is written.
    """
    flow, images = opened.flow, len(opened.flow.event_shape) == 3
    n = n or (100 if images else 10_000)
    out = given or run_dir_of(opened.path) / "samples.npy"
    check_outputs([out, out.with_suffix(".png")], [opened.path, *paths_of(opened.config["data"])])
    # refused before anything is read or drawn
    if label is not None:
        flow.check_label(label)
    data = beside(opened) if images or flow.event_shape in ((1,), (2,)) else None
    if data is not None:
        check_fits(flow, data)
    elif log_scale:
        raise ConfigError("log_scale=true: is for the picture of one or two columns, and there is none; leave it out")
    torch.manual_seed(seed)
    labels = label if flow.classes is None or label is not None else flow.drawn_labels(n)
    samples = flow.sample(n, temperature, label=labels).cpu()
    check_samples(samples)
    write_npy(out, flow.quantized(samples).numpy())
    rows = rows_of_checks(flow.event_shape)
    few = labels[:rows] if isinstance(labels, Tensor) else labels
    with status("round trip"):
        error = roundtrip_error(flow, samples[:rows], few)
    print(f"{n} samples, round trip error {error:.1e}, written to {out}")
    if data is not None:
        words = f"{n} samples" + ("" if label is None else f" of class {label}")
        title = opened.titled(words if temperature == 1 else f"{words} at temperature {temperature:g}")
        with status("drawing samples"):
            draw(flow, data, out.with_suffix(".png"), title, samples, label, log_scale)
        print(f"picture in {out.with_suffix('.png')}")
    return 0


def beside(opened: Opened) -> Dataset | None:
    """The data that a picture is drawn beside; None, and a word of it, where it is not to be had."""
    try:
        with status("reading the data"):
            return opened.build()
    except DataError as e:
        print(f"no picture beside the data, which is not to be had: {e}", file=sys.stderr)
        return None
