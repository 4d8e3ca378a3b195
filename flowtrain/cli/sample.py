"""`flowsample`: draws samples from a checkpoint into a .npy file."""

import sys
from typing import Any

import torch

from flowtrain.build import build_data
from flowtrain.checks import number, whole
from flowtrain.cli.files import check_outputs, paths_of, run_dir_of, written_as
from flowtrain.cli.messages import run_command
from flowtrain.cli.opened import open_checkpoint
from flowtrain.cli.overrides import split_own
from flowtrain.errors import ConfigError, DataError, NonFiniteError
from flowtrain.evaluation import check_fits, roundtrip_error, rows_of_checks
from flowtrain.files import write_json, write_npy
from flowtrain.pictures import draw
from flowtrain.plots import draw_quality
from flowtrain.quality import quality
from flowtrain.run import messages, title_of

USAGE = """flowsample ckpt=RUN_DIR_OR_FILE [n=10000] [seed=0] [temperature=1.0] [label=7] [out=FILE.npy] [KEY=VALUE ...]

  ckpt          a run directory (its best checkpoint) or a .pt file
  n             how many samples; default: 10000, of images 100
  seed          of the base noise
  temperature   factor on the base noise; 1 samples the density
  label         of a conditional model; default: all classes in turn, 0, 1, 2, ...
  out           .npy file in data units, pixels as whole numbers; default: samples.npy in the run directory.
                2-D samples and images come with a picture.
  quality       in place of samples, how near they come to test data by the number of steps, as in [1,2,4,8,16]:
                a table, quality.json and plots/quality.png
  device        auto (default), cpu, cuda or cuda:0
  trust         packages besides flowtrain that the checkpoint may build from: trust=[mypkg]

The solver can be changed, as in solver.rtol=1e-3 or solver=euler solver.steps=4."""


def main() -> None:
    with messages():
        run_command("flowsample", _command)


def _command() -> int:
    own: dict[str, Any] = {
        "ckpt": None,
        "n": None,
        "seed": 0,
        "temperature": 1.0,
        "label": None,
        "out": None,
        "quality": None,
        "device": "auto",
        "trust": [],
    }
    own, overrides = split_own(sys.argv[1:], own, USAGE)
    seed = whole("seed", own["seed"], least=0)
    temperature = number("temperature", own["temperature"], inclusive=True)
    if own["quality"] is not None:
        return report_quality(own, overrides, seed)
    given = written_as("out", own["out"], ".npy")
    label = None if own["label"] is None else whole("label", own["label"], least=0)
    opened = open_checkpoint(own, overrides)
    flow, config = opened.flow, opened.config
    images = len(flow.event_shape) == 3
    n = (100 if images else 10_000) if own["n"] is None else whole("n", own["n"])
    out = given or run_dir_of(opened.path) / "samples.npy"
    check_outputs([out, out.with_suffix(".png")], [opened.path, *paths_of(config["data"])])
    labels = label if flow.classes is None or label is not None else flow.in_turn(n)
    # refused before anything is read or drawn
    flow.labels(labels, torch.empty(n, 0, device=flow.like.device))
    data = None
    if images or flow.event_shape == (2,):
        try:
            data = build_data(config)
        except DataError as e:
            print(f"no picture beside the data, which is not to be had: {e}", file=sys.stderr)
    if data is not None:
        check_fits(flow, data)
    torch.manual_seed(seed)
    samples = flow.sample(n, temperature, label=labels).cpu()
    bad = int((~torch.isfinite(samples)).sum())
    if bad:
        raise NonFiniteError(f"{bad} of the values sampled are NaN or infinite: nothing was written")
    write_npy(out, (flow.quantized(samples) if images else samples).numpy())
    rows = rows_of_checks(flow.event_shape)
    few = labels[:rows] if isinstance(labels, torch.Tensor) else labels
    print(f"{n} samples, round trip error {roundtrip_error(flow, samples[:rows], few):.1e}, written to {out}")
    if data is not None:
        title = f"{title_of(config)}, {n} samples" + ("" if label is None else f" of class {label}")
        draw(flow, data, out.with_suffix(".png"), title, samples, label)
        print(f"picture in {out.with_suffix('.png')}")
    return 0


def report_quality(own: dict[str, Any], overrides: list[str], seed: int) -> int:
    """Sample quality against steps: a table, JSON and a figure."""
    unused = [key for key in ("n", "label") if own[key] is not None] + ["temperature"] * (own["temperature"] != 1.0)
    if unused:
        raise ConfigError(f"{unused[0]}: has no use beside quality, which takes as many samples as there are data")
    given = written_as("out", own["out"], ".json")
    steps = own["quality"]
    if not isinstance(steps, list) or not steps:
        raise ConfigError(f"quality={steps}: give a list of numbers of steps, as in [1,2,4,8]")
    steps = [whole(f"quality[{i}]", k) for i, k in enumerate(steps)]
    opened = open_checkpoint(own, overrides)
    flow, config = opened.flow, opened.config
    out = given or run_dir_of(opened.path) / "quality.json"
    picture = out.with_suffix(".png") if given else out.parent / "plots/quality.png"
    check_outputs([out, picture], [opened.path, *paths_of(config["data"])])
    found = quality(flow, build_data(config), steps, seed)
    write_json(out, found.to_dict())
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in found.rows:
        nfe, distance = lines.setdefault(row.method, ([], []))
        nfe.append(row.nfe)
        distance.append(row.sliced_wasserstein)
    exact = (found.exact.nfe, found.exact.sliced_wasserstein)
    title = f"{title_of(config)}, samples by few steps"
    draw_quality(picture, lines=lines, exact=exact, data=found.data, title=title)
    print(f"{found.table()}\nwritten to {out}, picture in {picture}")
    return 0
