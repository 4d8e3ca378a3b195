"""The options `weights` and `resample` of `flowsample`: importance weights of samples for the target of a run."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.cli.evaluate_target import target_data_of
from flowtrain.cli.load_run import LoadedRun
from flowtrain.cli.sample import WEIGHTS
from flowtrain.data.tables.output import NAMED
from flowtrain.data.targets.base import Target
from flowtrain.evaluation import check_fits
from flowtrain.evaluation.log_weights import weighted_samples
from flowtrain.evaluation.pareto import weight_tail
from flowtrain.evaluation.targets import check_pareto_k, usable_weights
from flowtrain.flow import Density
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.weighting import effective_rows, resample

log = logging.getLogger("flowtrain")


def weights_path(out: Path) -> Path:
    """Returns the file that contains the log weights of the samples in `out`.

    Example:
        >>> weights_path(Path("x.npy")).name, weights_path(Path("x.csv")).name
        ('x_log_weights.npy', 'x.csv')
    """
    return out if out.suffix in NAMED else out.with_name(f"{out.stem}{WEIGHTS}{out.suffix}")


def has_target(loaded_run: LoadedRun) -> bool:
    """Returns whether the config of a run names a target. The config cannot name a function from Python."""
    return bool(loaded_run.config.get("target"))


def target_of(loaded_run: LoadedRun, log_weights: bool) -> Target:
    """Returns the target of a run, on the device of its flow.

    Args:
        log_weights: whether the message names weights=true. False: resample=true.

    Raises:
        ConfigError: the run was trained on data, or on a function from Python.
        DataError: the file of the target has changed, see `target_data_of`.
    """
    if not has_target(loaded_run):
        what = "weights=true" if log_weights else "resample=true"
        raise ConfigError(
            f"{what} needs a run on a target, such as target=funnel, but {loaded_run.path} was trained on data or on a "
            "function from Python; leave this option out"
        )
    data = target_data_of(loaded_run)
    check_fits(loaded_run.flow, data)
    data.to(loaded_run.flow.like.device)
    return data.target


def draw_weighted(
    flow: Density, target: Target, n: int, seed: int, resampled: bool
) -> tuple[Tensor, Tensor | None, str]:
    """Draws n samples of a flow with normalized log weights log(w_i / sum w) for a target, in nats.

    `Density.sample` draws the same samples for this seed. If Pareto k is too large, a warning is logged.

    Args:
        resampled: whether to draw n samples with replacement from these samples, with probabilities proportional to
            their weights.

    Returns:
        The samples (n, d), the log weights (n,) in float64 or None if `resampled`, and a text with the effective sample
        size and Pareto k.

    Raises:
        NonFiniteError: more than 1% of the weights are NaN or infinite, or all weights are 0.
    """
    drawn = weighted_samples(flow, target, n, seed)
    log_w, unusable = usable_weights(drawn)
    log_w = log_w - log_w.logsumexp(0)
    w = log_w.exp()
    tail = weight_tail(w)
    check = check_pareto_k(None if tail is None else tail.k, n)
    if check.passed is False:
        log.warning("%s", check.message)
    if unusable.any():
        log.warning("the weights of %d of %d samples are NaN or infinite, and count as 0", int(unusable.sum()), n)
    k = "unknown" if tail is None else f"{tail.k:.2f}"
    words = f"weights: effective sample size {effective_rows(w) / n:.1%} of {n}, Pareto k {k}"
    if not resampled:
        return drawn.x, log_w, words
    rows = resample(w, n, seed)
    # shuffled, because equal rows follow each other
    rows = rows[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    return drawn.x[rows], None, f"{words}, {len(set(rows.tolist()))} different samples"
