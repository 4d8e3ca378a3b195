"""Evaluates a flow on held-out data: NLL, error budget, checks, calibration and OOD detection."""

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

from flowtrain.data.base import Dataset, Samples
from flowtrain.data.tables.from_memory import table_of
from flowtrain.data.tables.rows_to_score import RowsInMemory
from flowtrain.evaluation.baselines import GAUSSIAN, baselines, of_baseline, warn_if_better
from flowtrain.evaluation.calibration import calibration, density_calibration
from flowtrain.evaluation.checks import checks
from flowtrain.evaluation.error_budget import budget, stderr, subset_of
from flowtrain.evaluation.log_likelihood import (
    Scores,
    estimates_trace,
    held_out,
    log_probs,
    nfe_of_pass,
    score_rows,
    trace_rule,
)
from flowtrain.evaluation.ood_detection import ood_detection
from flowtrain.evaluation.outliers import check_some_finite, concentration
from flowtrain.evaluation.result import Calibration, Evaluation, Member, OODDetection
from flowtrain.flow import Density, Flow, Label, Rows, rows_at_a_time
from flowtrain.models.ensemble import Ensemble
from flowtrain.ode import record_solves
from flowtrain.utils.arguments import number, shortened, whole
from flowtrain.utils.errors import ConfigError, DataError, SolverError
from flowtrain.utils.formatting import as_ranges
from flowtrain.utils.process import one_thread_if_small, own_settings, seeded
from flowtrain.utils.status import phase

log = logging.getLogger("flowtrain")

# largest number of rows of a set whose ODE solve may fail
UNSOLVED = 100
# largest number of validation samples that H is computed from
MOST_TYPICAL = 10_000
# number of rows of the error budget if time is short
FEW = 10
# largest number of rows whose density is ranked, and how many samples each is ranked among
RANKED, RANKED_SAMPLES = 1000, 4


def evaluate(
    flow: Density,
    data: Dataset | Tensor | Rows,
    split: str = "test",
    step: int | None = None,
    batch_size: int | None = None,
    dequantization_samples: int = 1,
    other: tuple[str, Tensor] | None = None,
    seed: int = 0,
    trained_on: Dataset | Tensor | Rows | None = None,
    thorough: bool = True,
    *,
    label: Label | str = None,
    dtype: torch.dtype | None = None,
    baseline_seconds: float = 0.0,
) -> Evaluation:
    """The negative log-likelihood (NLL) of a flow on held-out rows, in nats per sample, with its error and checks.

    Of an ensemble, the NLL is that of its own density, and the NLL and weight of each member are listed. Checks that
    need a map from base to data are made of each member.

    The rows are scored in evaluation mode. Afterwards, the flow and the settings and random state of torch are as
    before. The check `concentration` fails if log p of a row is not finite, or if the ODE of a row cannot be solved.
    Failed checks are logged as warnings by the logger `flowtrain`.

    Args:
        data: rows (n, *event_shape) in data units that the flow was not trained on: an array, a tensor or a data frame,
            see `Flow.read_rows`. Or a `flowtrain.data.Dataset`.
        split: the held-out set of a `Dataset`: "val" or "test". It has no effect on rows.
        step: the step in the report. None: the step of `flow.record`, or 0 without a record.
        batch_size: the number of rows that are scored at once. None: chosen by the size of a sample.
        dequantization_samples: the number of noise draws for each row of an integer-valued flow. exp(log p) is averaged
            over them.
        other: (name, samples) of another set. The report says how well log p separates it from `data`. A conditional
            flow uses log p without labels, averaged over all classes.
        seed: the seed of the noise of dequantization and of estimated traces.
        trained_on: the rows or the data set that the flow was trained on. The baselines are fitted to them, see
            `flowtrain.evaluation.baselines`. None: no baselines. The validation set of a `Dataset` also gives the
            entropy for the typicality score of `other`. Otherwise the scored rows give it.
        thorough: if false, only `concentration` and `baseline` are checked, and the error budget is measured on only
            10 rows (FEW).
        label: for a conditional flow, the labels of the rows, or the name of their column in a data frame.
        dtype: evaluates a copy of the flow in this dtype, such as `torch.float64`. None: the dtype of the flow.
        baseline_seconds: the time that a Gaussian mixture (needs scikit-learn) and a kernel density estimate, fitted to
            `trained_on`, may take; only for vectors without labels. 0: the baseline is a Gaussian alone.

    Returns:
        An `Evaluation`. `print` shows it as a table, and a notebook as HTML.

    Raises:
        ConfigError: several dequantization samples of data that are not whole numbers, a dtype that is not real, or
            `baseline_seconds` without `trained_on`, or for images or conditional flows.
        DataError: data of another kind than the flow takes, missing values, or no rows.
        FlowtrainError: rows of another shape, or labels missing, superfluous or out of range.
        NonFiniteError: no log-likelihood is finite.
        SolverError: more than 100 rows cannot be solved.

    Example:
        >>> from flowtrain.bijections.linear import Affine
        >>> found = evaluate(Flow((2,), Affine(2)), torch.zeros(10, 2))
        >>> round(found.nll, 4), found.n, found.failed  # log(2 pi)
        (1.8379, 10, [])
    """
    _check_arguments(flow, batch_size, dequantization_samples, seed, other)
    if step is None:
        step = 0 if flow.record is None else flow.record.step
    if dtype is not None and dtype != flow.like.dtype:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype}: give torch.float32 or torch.float64")
        flow = copy.deepcopy(flow).to(dtype)
    if number("baseline_seconds", baseline_seconds, inclusive=True):
        _check_baselines(flow, trained_on)
    # of the run's own sets: where a command scores all rows of a file, `trained_on` is there for H alone
    fitted = trained_on if split != "all" or baseline_seconds else None
    if isinstance(data, str):
        raise DataError(f"data={data!r}: give rows, or a data set such as flowtrain.data.Moons()")
    if isinstance(data, Dataset):
        if label is not None:
            raise ConfigError("label: a data set has labels of its own; leave it out")
    else:
        data, split, fitted = dataset_of(flow, data, label, seed), "all", trained_on
    if not isinstance(fitted, Dataset | None):
        # the baseline does not use labels
        fitted = dataset_of(flow, fitted, None if flow.classes is None else flow.seen[0], seed, "trained_on")
    typical = trained_on if isinstance(trained_on, Dataset) else None
    device = flow.like.device
    how: dict[str, Any] = {"batch_size": batch_size, "draws": dequantization_samples, "seed": seed}
    with own_settings(device), one_thread_if_small(flow.event_shape, device), _in_evaluation_mode(flow):
        return _evaluate(flow, data, split, step, how, other, fitted, typical, thorough, baseline_seconds)


def _check_arguments(flow: Any, batch_size: Any, draws: Any, seed: Any, other: Any) -> None:
    """Refuses arguments of `evaluate` that are not of their kind.

    Raises:
        ConfigError: naming the argument.
    """
    if not isinstance(flow, Density):
        raise ConfigError(f"flow={shortened(flow)}: give a Flow, then its data")
    if batch_size is not None:
        whole("batch_size", batch_size)
    whole("dequantization_samples", draws)
    whole("seed", int(seed) if isinstance(seed, Integral) else seed, least=0)
    named = isinstance(other, tuple) and len(other) == 2 and isinstance(other[0], str) and isinstance(other[1], Tensor)
    if other is not None and not named:
        raise ConfigError(f"other={shortened(other)}: give (name, samples as a tensor)")


def _check_baselines(flow: Density, trained_on: Any) -> None:
    """Refuses baselines other than the Gaussian where they are no density of the same rows.

    Raises:
        ConfigError: images, a conditional flow, or no finite training set.
    """
    if len(flow.event_shape) != 1:
        raise ConfigError(f"baselines: only for vectors, and the flow takes samples of shape {flow.event_shape}")
    if flow.classes is not None:
        raise ConfigError(
            "baselines: the flow is conditional. The baselines ignore labels, so they are other densities; leave it out"
        )
    if trained_on is None:
        raise ConfigError("baselines: give trained_on, the rows that the flow was trained on")
    if isinstance(trained_on, Dataset) and trained_on.train_rows(1) is None:
        raise ConfigError("baselines: the data have no finite training set, to which they are fitted; leave it out")


def dataset_of(
    flow: Density, x: Tensor | Rows, label: Label | str = None, seed: int = 0, name: str = "x"
) -> RowsInMemory:
    """A data set of rows for a flow, see `Flow.read_rows`, with the noise on columns that a run adds.

    Args:
        name: the name of the rows in messages.

    Raises:
        DataError: no rows, or values that are missing or not of the flow's kind.
    """
    rows, labels = flow.read_rows(x, label, name)
    if len(rows) == 0:
        raise DataError(f"{name} has no rows; give at least one")
    samples = Samples(
        flow.event_shape,
        flow.integer_valued,
        flow.levels,
        classes=flow.classes,
        noisy=flow.noisy,
        class_counts=flow.class_counts,
        columns=() if flow.record is None else flow.record.samples.columns,
    )
    width = math.prod(flow.event_shape)
    table = table_of(rows.reshape(len(rows), width), name)
    if len(samples.columns) == width:
        table = replace(table, columns=samples.columns)
    return RowsInMemory(table, None if labels is None else labels.cpu(), samples, seed)


@contextmanager
def _in_evaluation_mode(flow: Density) -> Iterator[None]:
    """Evaluation mode for all modules; after, each has the mode that it had."""
    training = [module for module in flow.modules() if module.training]
    flow.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _evaluate(
    flow: Density,
    data: Dataset,
    split: str,
    step: int,
    how: dict[str, Any],
    other: tuple[str, Tensor] | None,
    fitted: Dataset | None,
    typical: Dataset | None,
    thorough: bool,
    baseline_seconds: float,
) -> Evaluation:
    """`evaluate` on a data set, by a flow in evaluation mode.

    Args:
        how: batch size, draws and seed, as `log_probs` takes them.
        fitted: the data whose training rows the baselines are fitted to.
        typical: the data whose validation rows give the entropy for `other`.
    """
    x, label = held_out(flow, data, split)
    check_fits(flow, data, how["draws"])
    begun = time.perf_counter()
    with phase(f"scoring the {split} set"):
        scores, way = scored(flow, x, label, split, how)
    log_p = scores.log_p
    nll, nll_stderr, bits = -float(log_p.mean()), stderr(log_p), flow.bits_per_nat
    truth = beside_truth(data, x, log_p)
    where = "file" if split == "all" else f"{split} set"
    concentrated = concentration(log_p, where, ("nats", 1.0) if bits is None else ("bits/dim", bits))
    ordinary = torch.ones(len(x), dtype=torch.bool)
    ordinary[list(concentrated.rows)] = False
    ordinary &= log_p.isfinite()
    subset = subset_of(flow, x, label, (~ordinary).nonzero().flatten(), None if thorough else FEW)
    with phase("estimating the error of the NLL"):
        parts = budget(flow, subset, log_p, how["draws"])
    simple = None
    if fitted is not None and len(flow.event_shape) == 1:
        with phase("fitting the baselines"):
            simple = baselines(fitted, dequantized_draws(flow, x, how), log_p, baseline_seconds)
    d = math.prod(flow.event_shape)
    judged = [concentrated, of_baseline(nll, nll_stderr, (simple or {}).get(GAUSSIAN), d)]
    if thorough:
        with phase("checking the density"):
            judged += checks(flow, subset, parts, log_p[ordinary], (truth["kl"], truth["kl_stderr"]))
    with phase("calibration"):
        if isinstance(flow, Flow):
            calibrated, pit = calibration(scores.z, flow.base)
        else:
            calibrated, pit = calibration_by_density(flow, log_p, label, how, thorough)
    told = None
    if other is not None:
        with phase(f"scoring {other[0]}"):
            told = detect_ood(flow, x, log_p, split, other, typical, how)
    with phase("round trip"):
        round_trip = roundtrip_error(flow, subset.x, subset.label)
    with phase("scoring the members of weight 0"):
        members = of_members(flow, scores.members, x, label, how)
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
        baselines=simple,
        **members,
        bits_per_nat=bits,
        scores=log_p,
        sets=None if told is None else told[1],
        pit=pit,
    )
    for check in result.failed:
        log.warning("%s: %s", check.label, check.message)
    warn_if_better(nll, nll_stderr, simple or {}, d)
    return result


def dequantized_draws(flow: Density, x: Tensor, how: Mapping[str, Any]) -> list[Tensor]:
    """Points at which densities are compared with log p of the flow: x (n, d), or x + u_k for each draw of the noise.

    The noise on whole numbers is that of `score_rows`, unless an estimated trace draws from the same stream.

    Args:
        how: batch size, draws and seed, as `log_probs` takes them.
    """
    if not flow.integer_valued:
        return [x]
    device = flow.like.device
    with seeded(how["seed"], device):
        draws = [
            [flow.dequantized(part.to(device)) for _ in range(how["draws"])]
            for part in torch.split(x, how["batch_size"] or rows_at_a_time(flow.event_shape))
        ]
    return [torch.cat(parts) for parts in zip(*draws, strict=True)]


def scored(
    flow: Density, x: Tensor, label: Tensor | None, split: str, how: Mapping[str, Any]
) -> tuple[Scores, dict[str, Any]]:
    """Scores a set x (n, *event_shape): log p (n,), latents of some rows, and how they were computed, for eval.json.

    Args:
        how: batch size, draws and seed, as `log_probs` takes them.
    """
    begun = time.perf_counter()
    with record_solves() as solves:
        found = score_rows(flow, x, label, unsolved=UNSOLVED, **how)
    check_some_finite(found.log_p, split)
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
    return found, way


def of_members(flow: Density, log_p: Tensor, x: Tensor, label: Tensor | None, how: Mapping[str, Any]) -> dict[str, Any]:
    """What an `Evaluation` says of the members of an ensemble, from log p of `flows`, (n, M).

    Members of weight 0 are scored now. If the ODE of one cannot be solved, it gets NaN at all rows.
    """
    if not isinstance(flow, Ensemble):
        return {"members": None, "spread": None, "member_scores": None}
    columns, active = [], iter(log_p.T)
    for member, weight in zip(flow.members, flow.weights, strict=True):
        if weight > 0:
            columns.append(next(active))
            continue
        try:
            columns.append(log_probs(cast(Flow, member), x, label, **how))
        except SolverError:
            columns.append(torch.full((len(x),), torch.nan, dtype=torch.float64))
    named = zip(flow.names, flow.weights, columns, strict=True)
    return {
        "members": tuple(Member(name, weight, -float(one.mean()), stderr(one)) for name, weight, one in named),
        "spread": spread(flow, log_p),
        "member_scores": torch.stack(columns, 1),
    }


def spread(ensemble: Ensemble, log_p: Tensor) -> float | None:
    """Mean over the rows of the weighted standard deviation of log p, (n, M), between the members; see `Evaluation`."""
    log_p = log_p[log_p.isfinite().all(1)]
    if not len(log_p) or log_p.shape[1] < 2:
        return None
    w = log_p.new_tensor(ensemble.log_weights).exp()
    mean = (log_p * w).sum(1, keepdim=True)
    return float(((log_p - mean).square() * w).sum(1).sqrt().mean())


def calibration_by_density(
    flow: Density, log_p: Tensor, label: Tensor | None, how: Mapping[str, Any], thorough: bool
) -> tuple[Calibration, dict[str, Tensor]]:
    """`density_calibration` of some rows, evenly spread, with RANKED_SAMPLES times as many samples of the flow.

    Args:
        log_p: that of the scored rows, (n,), and their labels.
    """
    every = math.ceil(len(log_p) / (RANKED if thorough else RANKED // 4))
    log_p, label = log_p[::every], None if label is None else label[::every].repeat(RANKED_SAMPLES)
    with seeded(how["seed"], flow.like.device), torch.no_grad():
        samples = flow.sample(RANKED_SAMPLES * len(log_p), label=label)
    if flow.integer_valued:
        samples = flow.quantized(samples)
    scores = score_rows(flow, samples, label, latents=0, unsolved=UNSOLVED, **how)
    return density_calibration(log_p, scores.log_p)


def beside_truth(data: Dataset, x: Tensor, log_p: Tensor) -> dict[str, Any]:
    """Entropy, KL and its standard error in nats, from the rows x (n, *event_shape) that log_p (n,) is of.

    KL(true || flow) = mean(log p_true - log p); None where the true density is not known.
    """
    true = data.log_prob(x)
    gap = None if true is None else true.cpu() - log_p
    kl = (None, None) if gap is None else (float(gap.mean()), stderr(gap))
    return {"entropy": data.entropy, "kl": kl[0], "kl_stderr": kl[1]}


def detect_ood(
    flow: Density,
    x: Tensor,
    log_p: Tensor,
    split: str,
    other: tuple[str, Tensor],
    trained_on: Dataset | None,
    how: Mapping[str, Any],
) -> tuple[OODDetection, tuple[Tensor, Tensor]]:
    """OOD detection: separates x (n, *event_shape) from `other` (m, *event_shape) by log p. Labels are not used.

    Args:
        log_p: log p of x, (n,); of a conditional flow with the labels of x.
        split: the name of the set x.
        trained_on: the data whose validation set gives H in |log p + H|. None: x itself gives H.
        how: batch size, draws and seed, as `log_probs` takes them.

    Returns:
        (areas under the ROC curves, log p of both sets, (n,) and (m,)).
    """

    def scores(rows: Tensor) -> Tensor:
        return score_rows(flow, rows, latents=0, unsolved=UNSOLVED, **how).log_p

    inside = log_p if flow.classes is None else scores(x)
    typical, of = inside, "scored rows"
    if trained_on is not None:
        of = "validation set"
        if trained_on.val is not x:
            typical = scores(trained_on.val[:MOST_TYPICAL])
    outside = scores(other[1])
    entropy = -float(typical[typical.isfinite()].mean())
    return ood_detection(other[0], inside, outside, entropy, of), (inside, outside)


def check_fits(flow: Density, data: Dataset, dequantization_samples: int = 1) -> None:
    """Refuses data that are not of the flow's kind; see `evaluate`."""
    if tuple(data.event_shape) != flow.event_shape:
        raise DataError(
            f"the flow takes samples of shape {flow.event_shape}; these samples have shape {tuple(data.event_shape)}"
        )
    if (flow.integer_valued, flow.levels, flow.noisy) != (data.integer_valued, data.levels, data.noisy):
        raise DataError(
            f"the flow takes {_kind(flow.integer_valued, flow.levels, flow.noisy)}; these data have "
            f"{_kind(data.integer_valued, data.levels, data.noisy)} (data.dequantize, data.levels)"
        )
    if dequantization_samples > 1 and not flow.integer_valued:
        why = "has noise on some columns, which is drawn once with the data" if flow.noisy else "has no noise"
        raise ConfigError(
            f"dequantization_samples={dequantization_samples}: this flow is over real numbers and {why}; omit it"
        )


@torch.no_grad()
def roundtrip_error(flow: Density, x: Tensor, label: Label = None) -> float:
    """max |x - forward(inverse(x))| in data units, whole numbers dequantized first by seeded noise.

    Of an ensemble, the largest of its members.
    """
    with seeded(0, flow.like.device):
        x = flow.dequantized(x)
        return max(float((x - one(one.inverse(x, label), label)).abs().max()) for one in flow.flows)


def _kind(integer_valued: bool, levels: int | None, noisy: tuple[int, ...]) -> str:
    """The kind of samples, for messages."""
    if not integer_valued:
        return f"real numbers, and whole ones in columns {as_ranges(noisy)}" if noisy else "real numbers"
    return "whole numbers" if levels is None else f"whole numbers from 0 to {levels - 1}"
