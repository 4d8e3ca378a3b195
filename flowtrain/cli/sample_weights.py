"""Importance weights of samples for the target of a run: the options `weights` and `resample` of `flowsample`."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.cli.evaluate_target import target_data_of
from flowtrain.cli.load_run import LoadedRun
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

# the column of log-weights in tables, and the ending of their file beside .npy
LOG_WEIGHT, WEIGHTS = "log_weight", "_log_weights"


def weights_path(out: Path) -> Path:
    """Returns the file of the log-weights of samples in `out`.

    Example:
        >>> weights_path(Path("x.npy")).name, weights_path(Path("x.csv")).name
        ('x_log_weights.npy', 'x.csv')
    """
    return out if out.suffix in NAMED else out.with_name(f"{out.stem}{WEIGHTS}{out.suffix}")


def has_target(loaded_run: LoadedRun) -> bool:
    """Returns whether a run was trained on a target that its config names."""
    return bool(loaded_run.config.get("target"))


def target_of(loaded_run: LoadedRun, log_weights: bool) -> Target:
    """Returns the target of a run, on the device of its flow.

    Args:
        log_weights: whether the option is weights=true, for the message. False: resample=true.

    Raises:
        ConfigError: the run has no target, or its target is a function in Python.
        DataError: the file of the target has changed, see `target_data_of`.
    """
    if not has_target(loaded_run):
        what = "weights=true" if log_weights else "resample=true"
        raise ConfigError(
            f"{what} needs a run on a target, as in target=funnel, but {loaded_run.path} was trained on data, or on a "
            "function from Python; leave this option out"
        )
    data = target_data_of(loaded_run)
    check_fits(loaded_run.flow, data)
    data.to(loaded_run.flow.like.device)
    return data.target


def weighted_by(flow: Density, target: Target, n: int, seed: int, resampled: bool) -> tuple[Tensor, Tensor | None, str]:
    """Draws n samples (n, d) of a flow with their log-weights log(w_i / sum w) for a target, (n,), in nats.

    The samples are the same as those of `Density.sample` for this seed. A warning names k of the weights if it is high.

    Args:
        resampled: whether to draw n samples with replacement from these samples, by their weights. The result then has
            no log-weights.

    Returns:
        The samples, the log-weights in float64, and a text with the effective sample size and Pareto k.

    Raises:
        NonFiniteError: many weights are NaN or infinite, or all weights are 0.
    """
    drawn = weighted_samples(flow, target, n, seed)
    log_w, lost = usable_weights(drawn)
    log_w = log_w - log_w.logsumexp(0)
    w = log_w.exp()
    tail = weight_tail(w)
    check = check_pareto_k(None if tail is None else tail.k, n)
    if check.passed is False:
        log.warning("%s", check.message)
    if lost.any():
        log.warning("%d of %d samples have weight 0, because their weights are NaN or infinite", int(lost.sum()), n)
    k = "unknown" if tail is None else f"{tail.k:.2f}"
    words = f"weights: effective sample size {effective_rows(w) / n:.1%} of {n}, Pareto k {k}"
    if not resampled:
        return drawn.x, log_w, words
    rows = resample(w, n, seed)
    # equal rows should not follow each other
    rows = rows[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    return drawn.x[rows], None, f"{words}, {len(set(rows.tolist()))} different samples"
