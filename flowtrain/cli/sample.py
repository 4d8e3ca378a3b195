"""The command line of `flowsample`: its options, and their help. This module does not import torch."""

import sys
from typing import Any

from flowtrain.cli.arguments import split_own
from flowtrain.cli.error_messages import run_command
from flowtrain.cli.late_imports import loading
from flowtrain.cli.usage import DEVICE_TEXT, RUN_TEXT, TRUST_TEXT, WEIGHTS_TEXT, Usage
from flowtrain.runs.console import messages

# the column of log weights in tables, and the end of the name of their file beside a .npy file
LOG_WEIGHT, WEIGHTS = "log_weight", "_log_weights"

USAGE = Usage(
    name="flowsample",
    summary="draws samples from a run, animates them, or measures their quality",
    arguments=["RUN [KEY=VALUE ...]"],
    examples=[
        ("flowsample outputs/first n=10000", "samples.npy in the run directory"),
        ("flowsample outputs/first n=10000 seed=1 out=x.csv", "other samples, in x.csv with names of columns"),
        ("flowsample outputs/digits label=7", "samples of one class of a conditional model"),
        ("flowsample outputs/cond 'context={mass: 1.5, kind: red}'", "samples at one context (data.context)"),
        ("flowsample outputs/cond context=new.csv n=100 out=x.csv", "100 samples for each row of new.csv"),
        ("flowsample outputs/first animate=true", "animation.gif: from the base to the data"),
        ("flowsample outputs/first quality=[1,2,4,8]", "distance to test data by solver steps"),
        ("flowsample outputs/funnel weights=true out=x.csv", "samples with log weights for the target of the run"),
        ("flowsample outputs/first solver=euler solver.steps=4", "samples by another solver"),
    ],
    options={
        "ckpt": RUN_TEXT,
        "weights": "true: also writes log weights, for a run on a target. They are log(w_i / sum w) in nats, with "
        "w = p~(x) / q(x) for the target p~ and the flow q. A .csv or .parquet file has them in the column "
        f"{LOG_WEIGHT}. For FILE.npy, they are in FILE{WEIGHTS}.npy. Other values are for ensembles. {WEIGHTS_TEXT}",
        "resample": "true: resamples the samples by weight, for a run on a target. Samples are drawn with replacement. "
        "weights and resample print the effective sample size and Pareto k of the "
        "weights. Above k = 0.7, a few samples dominate",
        "n": "Number of samples (default: 10000, or 100 for images). With context=FILE: the number for each row of the "
        "file (default: 1). With animate: 2000 (at most 100000), or 60 for images (at most 200)",
        "seed": "Seed of the base noise (default: 0)",
        "temperature": "Factor of the base noise (default: 1). 1 samples the density",
        "label": "The class, for a conditional model. Default: classes are drawn by their frequency in training",
        "context": "For a model that was trained with data.context. FILE, such as new.csv: n samples for each row of "
        "the file, in the order of its rows. The columns of the context are found by name, and other columns are "
        "ignored. '{mass: 1.5, kind: red}': n samples at one context. A .npy file contains the samples only, "
        "(rows * n, columns). A .csv or .parquet file begins with the columns of the context",
        "out": "The .npy, .csv or .parquet file (default: samples.npy in the run directory). Samples have the units of "
        "the data. Pixels and counts are whole numbers. .csv and .parquet have the column names of the training file, "
        "and for a conditional model its column of labels. .parquet needs polars (pip install 'flowtrain[tables]'). "
        "Samples of one or two columns and images are also drawn beside the data, samples of more columns with "
        "plots.columns=[0,2:5]",
        "log_scale": "true: the picture shows the logarithm of the densities, and so their tails",
        "animate": "true: draws an animation from the base to the data, for two columns or images. It takes the place "
        "of the samples, and is written to animation.gif in the run directory, and to animation.mp4 if ffmpeg is "
        "installed. out=FILE.gif or out=FILE.mp4 names the file",
        "quality": "Numbers of solver steps, as in [1,2,4,8,16]: compares samples with test data. Writes a table, "
        "quality.json and plots/quality.png in place of samples",
        "device": DEVICE_TEXT,
        "trust": TRUST_TEXT,
    },
    notes=[
        "The solver can be changed, as in solver.rtol=1e-3 or solver=euler solver.steps=4. Keys of figures: "
        "plots.format=[png,pdf,svg], plots.title=false, plots.columns=[0,2:5]."
    ],
    more=[("flowsample --help solver", "keys of the solver can be changed")],
)

OWN: dict[str, Any] = {
    "ckpt": None,
    "n": None,
    "seed": 0,
    "temperature": 1.0,
    "label": None,
    "context": None,
    "out": None,
    "log_scale": False,
    "animate": False,
    "quality": None,
    "device": "auto",
    "trust": [],
    "weights": None,
    "resample": False,
}


def main() -> None:
    """Runs the command `flowsample`."""
    with messages():
        run_command("flowsample", _command)


def _command() -> int:
    own, overrides = split_own(sys.argv[1:], OWN, USAGE)
    with loading():
        from flowtrain.cli.sample_run import run
    return run(own, overrides)
