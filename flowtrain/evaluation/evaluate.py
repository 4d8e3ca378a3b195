"""Likelihoods on held-out data, with what is known of their error."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.evaluation.baseline import GAUSSIAN, gaussian_baseline, of_baseline
from flowtrain.evaluation.calibration import calibration
from flowtrain.evaluation.checks import checks
from flowtrain.evaluation.error_budget import budget, stderr, subset_of
from flowtrain.evaluation.log_likelihood import (
    estimates_trace,
    held_out,
    log_probs_and_latents,
    nfe_of_pass,
    trace_rule,
)
from flowtrain.evaluation.ood_detection import ood_detection
from flowtrain.evaluation.outliers import check_some_finite, concentration
from flowtrain.evaluation.result import Evaluation, OODDetection
from flowtrain.flow import Flow, Label
from flowtrain.ode import record_solves
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.formatting import as_ranges
from flowtrain.utils.process import seeded
from flowtrain.utils.status import phase

log = logging.getLogger("flowtrain")

# largest number of rows of a set whose ODE solve may fail
UNSOLVED = 100
# largest number of validation samples that H is computed from
MOST_TYPICAL = 10_000
# number of rows of the error budget if time is short
FEW = 10


def evaluate(
    flow: Flow,
    data: Dataset,
    split: str = "test",
    step: int = 0,
    batch_size: int | None = None,
    dequantization_samples: int = 1,
    other: tuple[str, Tensor] | None = None,
    seed: int = 0,
    trained_on: Dataset | None = None,
    thorough: bool = True,
) -> Evaluation:
    """Scores a flow in evaluation mode on a held-out set of `data`.

    The check `concentration` fails if log p of a row is not finite, or if the ODE of a row cannot be solved.

    Args:
        other: the name and the samples of a set to tell that one from by log p; by that of all classes together where
            the flow is conditional.
        seed: of the noise of dequantization and of estimated traces.
        trained_on: the data that the flow was trained on, for the baseline and for the typicality score of `other`.
            Without it there is no baseline, and the score uses the NLL of the scored rows.
        thorough: if false, only `concentration` and `baseline` are checked, and the error budget is measured on only
            10 rows (FEW).

    Raises:
        ConfigError: several dequantization samples of data that are not whole numbers.
        DataError: data of another shape or kind than the flow's.
        NonFiniteError: no log-likelihood is finite.
        SolverError: more than 100 rows cannot be solved.
    """
    x, label = held_out(flow, data, split)
    check_fits(flow, data, dequantization_samples)
    flow.eval()
    begun = time.perf_counter()
    how: dict[str, Any] = {"batch_size": batch_size, "draws": dequantization_samples, "seed": seed}
    with phase(f"scoring the {split} set"):
        log_p, z, way = scored(flow, x, label, split, how)
    nll, nll_stderr, bits = -float(log_p.mean()), stderr(log_p), flow.bits_per_nat
    truth = beside_truth(data, x, log_p)
    where = "file" if split == "all" else f"{split} set"
    concentrated = concentration(log_p, where, ("nats", 1.0) if bits is None else ("bits/dim", bits))
    ordinary = torch.ones(len(x), dtype=torch.bool)
    ordinary[list(concentrated.rows)] = False
    ordinary &= log_p.isfinite()
    subset = subset_of(flow, x, label, (~ordinary).nonzero().flatten(), None if thorough else FEW)
    with phase("estimating the error of the NLL"):
        parts = budget(flow, subset, log_p, dequantization_samples)
    with phase("fitting the Gaussian baseline"):
        # of the run's own sets: where all rows of a file are scored, `trained_on` is there for H alone
        simple = None if trained_on is None or split == "all" else gaussian_baseline(trained_on, x, log_p)
    judged = [concentrated, of_baseline(nll, nll_stderr, simple, math.prod(flow.event_shape))]
    if thorough:
        with phase("checking the density"):
            judged += checks(flow, subset, parts, log_p[ordinary], (truth["kl"], truth["kl_stderr"]))
    with phase("calibration"):
        calibrated, pit = calibration(z, flow.base)
    told = None
    if other is not None:
        with phase(f"scoring {other[0]}"):
            told = detect_ood(flow, x, log_p, split, other, trained_on, how)
    with phase("round trip"):
        round_trip = roundtrip_error(flow, subset.x, subset.label)
    result = Evaluation(
        nll=nll,
        nll_stderr=nll_stderr,
        n=len(x),
        split=split,
        step=step,
        bits_per_dim=None if bits is None else bits * nll,
        **truth,
        **way,
        solver_error=None if flow.solver is None else parts.solver,
        roundtrip_error=round_trip,
        total_seconds=time.perf_counter() - begun,
        budget=parts,
        checks=tuple(check for check in judged if check is not None),
        calibration=calibrated,
        ood=None if told is None else told[0],
        baselines=None if simple is None else {GAUSSIAN: simple},
        bits_per_nat=bits,
        scores=log_p,
        sets=None if told is None else told[1],
        pit=pit,
    )
    for check in result.failed:
        log.warning("%s: %s", check.label, check.message)
    return result


def scored(
    flow: Flow, x: Tensor, label: Tensor | None, split: str, how: Mapping[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """log p of a set x (n, *event_shape), (n,), latents of some rows, and what eval.json says of how they were come by.

    Args:
        how: batch size, draws and seed, as `log_probs` takes them.
    """
    begun = time.perf_counter()
    with record_solves() as solves:
        log_p, z = log_probs_and_latents(flow, x, label, unsolved=UNSOLVED, **how)
    check_some_finite(log_p, split)
    seconds = time.perf_counter() - begun
    rule, estimated = trace_rule(flow), estimates_trace(flow)
    way = {
        "trace": "hutchinson" if estimated else "exact",
        "noise_samples": rule.noise_samples if rule is not None and estimated else None,
        "dequantization_samples": how["draws"] if flow.integer_valued else None,
        "solver": None if flow.solver is None else flow.solver.describe(),
        "nfe": nfe_of_pass(flow, solves),
        "seconds": seconds,
        "device": str(flow.like.device),
        "dtype": str(flow.like.dtype).removeprefix("torch."),
    }
    return log_p, z, way


def beside_truth(data: Dataset, x: Tensor, log_p: Tensor) -> dict[str, Any]:
    """Entropy, KL and its standard error in nats, from the rows x (n, *event_shape) that log_p (n,) is of.

    KL(true || flow) = mean(log p_true - log p); None where the true density is not known.
    """
    true = data.log_prob(x)
    gap = None if true is None else true.cpu() - log_p
    kl = (None, None) if gap is None else (float(gap.mean()), stderr(gap))
    return {"entropy": data.entropy, "kl": kl[0], "kl_stderr": kl[1]}


def detect_ood(
    flow: Flow,
    x: Tensor,
    log_p: Tensor,
    split: str,
    other: tuple[str, Tensor],
    trained_on: Dataset | None,
    how: Mapping[str, Any],
) -> tuple[OODDetection, tuple[Tensor, Tensor]]:
    """How well log p separates the set x (n, *event_shape) from the `other` (m, *event_shape). Labels are not used.

    Args:
        log_p: that of x as it has been scored, (n,): by its labels where the flow is conditional.
        split: the name of the set x.
        trained_on: the data whose validation set gives H in |log p + H|. None: x itself gives H.
        how: batch size, draws and seed, as `log_probs` takes them.

    Returns:
        (areas under the ROC curves, log p of both sets, (n,) and (m,)).
    """

    def scores(rows: Tensor) -> Tensor:
        return log_probs_and_latents(flow, rows, latents=0, unsolved=UNSOLVED, **how)[0]

    inside = log_p if flow.classes is None else scores(x)
    typical, of = inside, "scored rows"
    if trained_on is not None:
        of = "validation set"
        if trained_on.val is not x:
            typical = scores(trained_on.val[:MOST_TYPICAL])
    outside = scores(other[1])
    entropy = -float(typical[typical.isfinite()].mean())
    return ood_detection(other[0], inside, outside, entropy, of), (inside, outside)


def check_fits(flow: Flow, data: Dataset, dequantization_samples: int = 1) -> None:
    """Refuses data that are not of the flow's kind; see `evaluate`."""
    if tuple(data.event_shape) != flow.event_shape:
        raise DataError(
            f"the flow was trained on samples of shape {flow.event_shape}; this data has {tuple(data.event_shape)}"
        )
    if (flow.integer_valued, flow.levels, flow.noisy) != (data.integer_valued, data.levels, data.noisy):
        raise DataError(
            f"the flow was trained on {_kind(flow.integer_valued, flow.levels, flow.noisy)}; this data has "
            f"{_kind(data.integer_valued, data.levels, data.noisy)} (data.dequantize, data.levels)"
        )
    if dequantization_samples > 1 and not flow.integer_valued:
        why = "has noise on some columns, which is drawn once with the data" if flow.noisy else "has no noise"
        raise ConfigError(
            f"dequantization_samples={dequantization_samples}: this flow is over real numbers and {why}; omit it"
        )


@torch.no_grad()
def roundtrip_error(flow: Flow, x: Tensor, label: Label = None) -> float:
    """max |x - forward(inverse(x))| in data units, whole numbers dequantized first by seeded noise."""
    with seeded(0, flow.like.device):
        x = flow.dequantized(x)
        return float((x - flow(flow.inverse(x, label), label)).abs().max())


def _kind(integer_valued: bool, levels: int | None, noisy: tuple[int, ...]) -> str:
    """What samples are, in words."""
    if not integer_valued:
        return f"real numbers, and whole ones in columns {as_ranges(noisy)}" if noisy else "real numbers"
    return "whole numbers" if levels is None else f"whole numbers from 0 to {levels - 1}"
