"""`flowsample`: draws samples from a checkpoint, animates them, or measures their quality by solver steps."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtrain.cli.arguments import split_own
from flowtrain.cli.error_messages import run_command
from flowtrain.cli.load_run import LoadedRun, load_run, set_name
from flowtrain.cli.output_files import check_outputs, paths_of, written_as
from flowtrain.data.base import Dataset, changes
from flowtrain.evaluation import check_fits, roundtrip_error, rows_of_checks
from flowtrain.evaluation.log_likelihood import check_samples
from flowtrain.evaluation.sample_quality import quality
from flowtrain.plotting.animation import KINDS, can_write_mp4, check_writable
from flowtrain.plotting.evaluation_figures import Distances, draw_quality
from flowtrain.plotting.pictures import draw
from flowtrain.plotting.transport_pictures import animate, check_animated
from flowtrain.runs.console import messages
from flowtrain.utils.arguments import flag, number, whole
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.files import write_json, write_npy
from flowtrain.utils.process import own_settings
from flowtrain.utils.status import status

log = logging.getLogger("flowtrain")


def report_quality(own: Mapping[str, Any], overrides: Sequence[str], seed: int) -> int:
    """A table, JSON and a figure; the exit code.

    Raises:
        ConfigError: keys that have no use here, or no numbers of steps.
    """
    unused = [key for key in ("n", "label") if own[key] is not None] + ["temperature"] * (own["temperature"] != 1.0)
    if unused:
        raise ConfigError(f"{unused[0]}: has no use beside quality, which takes as many samples as there are data")
    given = written_as("out", own["out"], ".json")
    steps = own["quality"]
    if not isinstance(steps, list) or not steps:
        raise ConfigError(f"quality={steps}: give a list of numbers of steps, as in [1,2,4,8]")
    steps = [whole(f"quality[{i}]", k) for i, k in enumerate(steps)]
    loaded_run = load_run(own, overrides)
    flow, config = loaded_run.single_flow("quality"), loaded_run.config
    name = set_name(loaded_run, "test", overrides)
    out = given or loaded_run.run_dir / f"quality{name and f'-{name}'}.json"
    picture = out.with_suffix(".png") if given else out.parent / f"plots/quality{name and f'-{name}'}.png"
    options = loaded_run.plot_options
    check_outputs([out, *options.files(picture)], [*loaded_run.files, *paths_of(config["data"])])
    with status("reading the data"):
        data = loaded_run.build()
    if change := changes(loaded_run.samples.record, data.record, ["val", "test"]):
        log.warning("since the run was trained, %s: the samples are compared with rows it was trained on", change)
    with status("comparing samples with the data"):
        found = quality(flow, data, steps, seed)
    write_json(out, found.to_dict())
    lines: dict[str, Distances] = {}
    for row in found.rows:
        line = lines.setdefault(row.method, Distances([], [], []))
        line.nfe.append(row.nfe)
        line.values.append(row.sliced_wasserstein)
        line.errors.append(row.stderr)
    exact = (found.exact.nfe, found.exact.sliced_wasserstein, found.exact.stderr)
    title = loaded_run.titled("sample quality by NFE")
    with status("drawing quality"):
        draw_quality(
            picture, lines=lines, exact=exact, data=(found.data, found.data_stderr), title=title, options=options
        )
    print(f"{found.table()}\nwritten to {out}, picture in {_listed(options.files(picture))}")
    return 0


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
    loaded_run = load_run(own, overrides)
    flow = loaded_run.single_flow("animate=true")
    check_animated(flow, n)
    # refused before anything is read
    if label is not None:
        flow.check_label(label)
    out = loaded_run.run_dir / "animation.gif"
    paths = [given] if given else [out, *([out.with_suffix(".mp4")] if can_write_mp4() else [])]
    check_outputs(paths, [*loaded_run.files, *paths_of(loaded_run.config["data"])])
    with status("reading the data"):
        data = loaded_run.build()
    check_fits(flow, data)
    title = loaded_run.titled("" if label is None else f"class {label}")
    options = loaded_run.plot_options
    animate(flow, data, paths, title, n=n, seed=seed, temperature=temperature, label=label, options=options)
    print("\n".join(f"written to {path}" for path in paths))
    return 0


USAGE = """flowsample ckpt=RUN_DIR_OR_FILE [n=10000] [seed=0] [temperature=1.0] [label=7] [out=FILE.npy] [KEY=VALUE ...]
flowsample ckpt=RUN_DIR_OR_FILE animate=true [n=2000] [seed=0] [temperature=1.0] [label=7] [out=FILE.gif]
flowsample ckpt=RUN_DIR_OR_FILE quality=[1,2,4,8,16] [seed=0] [out=FILE.json]

  ckpt          a run directory (its best checkpoint) or a .pt file; the name may be left out: flowsample RUN_DIR. A
                sweep directory, or a list of runs with the same data as in ckpt=[RUN1,RUN2], is an ensemble
  weights       of the members of an ensemble, as in weights=[0.3,0.7], or weights=equal; default: those with the
                highest likelihood of the validation rows
  n             how many samples; default: 10000, of images 100. Animated: 2000
                (at most 100000), of images 60 (200)
  seed          of the base noise
  temperature   factor on the base noise; 1 samples the density
  label         of a conditional model; default: classes by their frequency in training
  out           .npy file in data units, with pixels and counts as whole numbers; default: samples.npy in the run
                directory. Samples of one or two columns and images are also drawn beside the data; samples of more
                columns with plots.columns=[0,2:5]
  log_scale     true: that picture shows densities by their logarithm, and so the tails
  animate       true: in place of samples, how they come about from the base, of two columns or images:
                animation.gif in the run directory, and animation.mp4 where there is an ffmpeg; or out=FILE.gif, .mp4
  quality       in place of samples, how near they come to test data by the number of steps, as in [1,2,4,8,16]:
                a table, quality.json and plots/quality.png
  device        auto (default), cpu, cuda or cuda:0
  trust         packages besides flowtrain that the checkpoint may build from: trust=[mypkg]

The solver can be changed, as in solver.rtol=1e-3 or solver=euler solver.steps=4. Keys of figures:
plots.format=[png,pdf,svg], plots.title=false, plots.columns=[0,2:5]."""

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
    "weights": None,
}


def main() -> None:
    """The console script: see USAGE."""
    with messages(), own_settings(torch.device("cpu")):
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
    return write_samples(load_run(own, overrides), given, n, seed, temperature, label, log_scale)


def write_samples(
    loaded_run: LoadedRun,
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
    flow, images = loaded_run.flow, len(loaded_run.flow.event_shape) == 3
    n = n or (100 if images else 10_000)
    tag = loaded_run.tag and f"-{loaded_run.tag}"
    out = given or loaded_run.run_dir / f"samples{tag}.npy"
    options, picture = loaded_run.plot_options, out.with_suffix(".png")
    check_outputs([out, *options.files(picture)], [*loaded_run.files, *paths_of(loaded_run.config["data"])])
    # refused before anything is read or drawn
    if label is not None:
        flow.check_label(label)
    is_drawn = images or flow.event_shape in ((1,), (2,)) or options.columns is not None
    data = beside(loaded_run) if is_drawn else None
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
        title = loaded_run.titled(words if temperature == 1 else f"{words} at temperature {temperature:g}")
        with status("drawing samples"):
            draw(flow, data, picture, title, samples, label, log_scale, options)
        print(f"picture in {_listed(options.files(picture))}")
    return 0


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def beside(loaded_run: LoadedRun) -> Dataset | None:
    """The data that a picture is drawn beside; None, and a word of it, where it is not to be had."""
    try:
        with status("reading the data"):
            return loaded_run.build()
    except DataError as e:
        print(f"no picture beside the data, which is not to be had: {e}", file=sys.stderr)
        return None
