"""Evaluates a flow on held-out data: NLL, error budget, checks, calibration and OOD detection."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.base import Dataset, Samples
from flowtrain.data.in_memory import Extras
from flowtrain.data.tables.columns import default_names, first_of
from flowtrain.data.tables.from_memory import as_array, columns_of, is_frame, table_of
from flowtrain.data.tables.rows_to_score import RowsInMemory, ScoredRows
from flowtrain.data.tables.table_checks import check_weight_sizes
from flowtrain.data.types import differences
from flowtrain.evaluation.baselines import GAUSSIAN, baselines, check_baseline, warn_if_better
from flowtrain.evaluation.calibration import (
    Transformed,
    calibration,
    calibration_by_context,
    context_groups,
    density_calibration,
    density_ranks,
    transforms,
    warn_if_miscalibrated,
)
from flowtrain.evaluation.checks import checks
from flowtrain.evaluation.error_budget import COVERED, budget, subset_of
from flowtrain.evaluation.log_likelihood import (
    Scores,
    context_table,
    dequantized_parts,
    estimates_trace,
    held_out,
    latent_rows,
    log_probs,
    nfe_of_pass,
    score_rows,
    trace_rule,
)
from flowtrain.evaluation.ood_detection import ood_detection
from flowtrain.evaluation.outliers import check_some_finite, concentration
from flowtrain.evaluation.result import Budget, Calibration, Evaluation, Member, OODDetection, RowError
from flowtrain.evaluation.sbc import simulation_calibration
from flowtrain.flow import Context, Density, Flow, Rows, either, rows_at_a_time
from flowtrain.models.ensemble import Ensemble
from flowtrain.ode import record_solves
from flowtrain.utils.arguments import number, shortened, whole
from flowtrain.utils.errors import ConfigError, DataError, SolverError
from flowtrain.utils.formatting import as_ranges
from flowtrain.utils.process import one_thread_if_small, own_settings, seeded
from flowtrain.utils.status import phase
from flowtrain.utils.weighting import average, effective_rows, equal_rows, stderr

log = logging.getLogger("flowtrain")

# Largest number of rows of a set whose ODE solve may fail
UNSOLVED = 100
# Largest number of validation samples from which H of the typicality score is computed
MOST_TYPICAL = 10_000
# Number of rows of the error budget with `thorough=False`
FEW = 10
# Largest number of columns that a message names
MOST_NAMED = 5
# another set for OOD detection: its name, samples and, for flows with context columns, their context
Other = tuple[str, Tensor] | tuple[str, Tensor, Context]
# Calibration of ensembles: largest number of rows, and number of samples for each row
RANKED, RANKED_SAMPLES = 1000, 4


def evaluate(
    flow: Density,
    data: Dataset | Tensor | Rows,
    split: str = "test",
    step: int | None = None,
    batch_size: int | None = None,
    dequantization_samples: int = 1,
    other: Other | None = None,
    seed: int = 0,
    trained_on: Dataset | Tensor | Rows | None = None,
    thorough: bool = True,
    *,
    context: Context = None,
    label: Context = None,
    weights: Any = None,
    dtype: torch.dtype | None = None,
    baseline_seconds: float = 0.0,
    sbc: int = 0,
) -> Evaluation:
    """Computes the negative log-likelihood (NLL) of held-out rows in nats per sample, its error and checks of the flow.

    For an ensemble, the NLL is computed from the density of the ensemble. The NLL and the weight of each member are
    listed. Checks that need a map from base to data are made for each member.

    The rows are scored in evaluation mode. The state of the flow, the settings of torch and its random state do not
    change. The check `concentration` fails if log p of a row is not finite, or if the ODE of a row cannot be solved.
    The logger `flowtrain` logs failed checks as warnings.

    Args:
        flow: a flow or an ensemble.
        data: rows (n, *event_shape) in data units that the flow was not trained on: an array, a tensor or a data frame,
            see `Flow.read_rows`. Or a `flowtrain.data.Dataset`.
        split: the held-out set of a `Dataset`: "val" or "test". It has no effect on rows.
        step: the training step in the report. None means the step of `flow.record`, or 0 without a record.
        batch_size: the number of rows that are scored at once. None means a number that depends on the size of a
            sample.
        dequantization_samples: the number of noise draws for each row of an integer-valued flow. exp(log p) is averaged
            over them.
        other: (name, samples) of another set for OOD detection, which measures how well log p separates this set from
            `data`. For a flow with labels, log p is averaged over all classes. A flow with context columns needs
            (name, samples, context), with the context of each sample.
        seed: the seed of the noise of dequantization and of estimated traces.
        trained_on: the rows or the data set that the flow was trained on. The baselines are fitted to them, see
            `flowtrain.evaluation.baselines`. None means no baselines. The entropy for the typicality score of `other`
            is computed on the validation set of a `Dataset`, otherwise on the scored rows.
        thorough: if false, only `concentration` and `baseline` are checked, and the error budget is measured on only
            10 rows (FEW).
        context: for a conditional flow, the context of the rows, see `Flow.log_prob`. None reads it from a data frame.
        label: another name of `context`, for class labels, or the name of their column in a data frame.
        weights: weights of the rows, (n,), or the name of their column in a data frame. All means over rows are then
            weighted means. None means equal weights, or the weights of a `Dataset`.
        dtype: evaluates a copy of the flow in this dtype, such as `torch.float64`. None means the dtype of the flow.
        baseline_seconds: the time limit for fitting a Gaussian mixture (needs scikit-learn) and a kernel density
            estimate to `trained_on`; only for vectors without context. 0 means that the only baseline is a Gaussian.
        sbc: the number of samples for each of up to 1000 rows, for simulation-based calibration and expected coverage
            (`flowtrain.evaluation.sbc`); only for vectors. 0 means no SBC. 200 is a good number.

    Returns:
        An `Evaluation`. `print` shows it as a table, a notebook shows HTML tables.

    Raises:
        ConfigError: several dequantization samples for data that are not whole numbers, a dtype that is not real, or
            `baseline_seconds` without `trained_on`, for images or for conditional flows, `sbc` for images, or `other`
            without the context that the flow needs.
        DataError: data that do not fit the flow, missing values, or no rows.
        FlowtrainError: rows of another shape, or a context that is missing, not allowed or out of range.
        NonFiniteError: no log-likelihood is finite.
        SolverError: more than 100 rows cannot be solved.

    Example:
        >>> from flowtrain.bijections.linear import Affine
        >>> found = evaluate(Flow((2,), Affine(2)), torch.zeros(10, 2))
        >>> round(found.nll, 4), found.n, found.failed  # log(2 pi)
        (1.8379, 10, [])
    """
    _check_arguments(flow, batch_size, dequantization_samples, seed, other)
    context = either(context, label)
    if step is None:
        step = 0 if flow.record is None else flow.record.step
    if dtype is not None and dtype != flow.like.dtype:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype}: give torch.float32 or torch.float64")
        flow = copy.deepcopy(flow).to(dtype)
    if number("baseline_seconds", baseline_seconds, inclusive=True):
        _check_baselines(flow, trained_on)
    if whole("sbc", sbc, least=0) and len(flow.event_shape) != 1:
        raise ConfigError(f"sbc: only for vectors, but the flow has samples of shape {flow.event_shape}; omit sbc")
    # if a command scores all rows of a file, `trained_on` is only used for H, unless baselines are requested
    fitted = trained_on if split != "all" or baseline_seconds else None
    if isinstance(data, str):
        raise DataError(f"data={data!r}: give rows, or a data set such as flowtrain.data.Moons()")
    if isinstance(data, Dataset):
        if context is not None:
            raise ConfigError("context: a data set contains its context and its labels; omit the argument")
        if weights is not None:
            raise ConfigError("weights: a data set contains its weights; omit the argument")
    else:
        data, split, fitted = dataset_of(flow, data, context, seed, weights=weights), "all", trained_on
    if not isinstance(fitted, Dataset | None):
        # any context is valid here, because the baseline does not use it
        one = flow.some_context(1) if flow.classes is None else flow.classes_with_rows[0]
        fitted = dataset_of(flow, fitted, one, seed, "trained_on")
    typical = trained_on if isinstance(trained_on, Dataset) else None
    device = flow.like.device
    options: dict[str, Any] = {"batch_size": batch_size, "draws": dequantization_samples, "seed": seed}
    with own_settings(device), one_thread_if_small(flow.event_shape, device), in_evaluation_mode(flow):
        return _evaluate(flow, data, split, step, options, other, fitted, typical, thorough, baseline_seconds, sbc)


def _check_arguments(flow: Any, batch_size: Any, draws: Any, seed: Any, other: Any) -> None:
    """Checks the arguments of `evaluate`.

    Raises:
        ConfigError: an invalid argument.
    """
    if not isinstance(flow, Density):
        raise ConfigError(f"flow={shortened(flow)}: give a Flow as the first argument, then the data")
    if batch_size is not None:
        whole("batch_size", batch_size)
    whole("dequantization_samples", draws)
    whole("seed", int(seed) if isinstance(seed, Integral) else seed, least=0)
    if other is None:
        return
    named = isinstance(other, tuple) and len(other) in (2, 3) and isinstance(other[0], str)
    if not named or not isinstance(other[1], Tensor):
        raise ConfigError(f"other={shortened(other)}: give (name, samples as a tensor)")
    if flow.context and (len(other) == 2 or other[2] is None):
        names = ", ".join(column.name for column in flow.context)
        raise ConfigError(
            f"OOD detection of {other[0]}: the flow is conditional, but {other[0]} has no context; give data with the "
            f"columns {names}"
        )


def _check_baselines(flow: Density, trained_on: Any) -> None:
    """Checks that baselines other than the Gaussian are comparable with the flow.

    Raises:
        ConfigError: images, a conditional flow, or no finite training set.
    """
    if len(flow.event_shape) != 1:
        raise ConfigError(
            f"baselines: only for vectors, but the flow has samples of shape {flow.event_shape}; omit baselines"
        )
    if flow.conditional:
        raise ConfigError(
            "baselines: the Gaussian mixture and the kernel density estimate ignore the context, so they are not "
            "comparable with a conditional flow; omit baselines"
        )
    if trained_on is None:
        raise ConfigError("baselines: give trained_on, the rows that the flow was trained on")
    if isinstance(trained_on, Dataset) and trained_on.train_rows(1) is None:
        raise ConfigError("baselines: the data set has no finite training set to fit baselines to; omit baselines")


def dataset_of(
    flow: Density, x: Tensor | Rows, context: Context = None, seed: int = 0, name: str = "x", weights: Any = None
) -> RowsInMemory:
    """Converts rows to a data set for a flow. Noise is added to the same columns as in training.

    Args:
        x, context: the rows and their context, see `Flow.read_rows`.
        seed: the seed of the noise.
        name: the name of the rows in messages.
        weights: see `evaluate`.

    Raises:
        DataError: no rows, or values that are missing or do not fit the flow.
    """
    rows, found = flow.read_rows(x, context, name)
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
        context=flow.context,
        context_rows=flow.context_rows,
        types=flow.types,
    )
    width = math.prod(flow.event_shape)
    table = table_of(rows.reshape(len(rows), width), name)
    if len(samples.columns) == width:
        table = replace(table, columns=samples.columns)
    found = None if found is None else found.cpu()
    extras = Extras(context=found) if flow.context else Extras(label=found)
    if weights is not None:
        extras = extras._replace(weights=row_weights(flow, x, weights, len(rows), name))
    return RowsInMemory(table, extras, samples, seed)


def row_weights(flow: Density, x: Tensor | Rows, weights: Any, n: int, name: str = "x") -> Tensor:
    """Converts the weights of n rows x to a tensor (n,), float64.

    Args:
        weights: numbers, or the name of a column of a data frame.
        name: the name of the rows in messages.

    Raises:
        DataError: another number of weights, weights that are not finite, or negative weights of a flow that was not
            trained with data.signed_weights=true.
    """
    if isinstance(weights, str):
        if not is_frame(x):
            raise DataError(f"weights={weights!r}: {name} is not a data frame, so it has no column of that name")
        weights = columns_of(x, [weights], name)
    found = torch.from_numpy(as_array(weights, "weights").astype("float64").reshape(-1))
    if len(found) != n:
        raise DataError(f"weights has {len(found)} values; give one weight for each of the {n} rows of {name}")
    if not bool(found.isfinite().all()):
        raise DataError("weights has values that are NaN or infinite; remove these rows")
    check_weight_sizes(found.numpy(), "weights, row {} (from 0)".format)
    config = {} if flow.record is None else flow.record.config.get("data", {})
    if bool((found < 0).any()) and not config.get("signed_weights"):
        raise DataError(
            f"weights has {int((found < 0).sum()):,} negative values, which is only allowed for a flow that was "
            "trained with data.signed_weights=true"
        )
    return found


@contextmanager
def in_evaluation_mode(flow: Density) -> Iterator[None]:
    """Sets all modules to evaluation mode, and restores their modes afterwards."""
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
    options: dict[str, Any],
    other: Other | None,
    fitted: Dataset | None,
    typical: Dataset | None,
    thorough: bool,
    baseline_seconds: float,
    sbc: int,
) -> Evaluation:
    """Evaluates a flow in evaluation mode on a data set; see `evaluate`.

    Args:
        options: batch size, draws and seed: arguments of `log_probs`.
        fitted: the data whose training rows the baselines are fitted to.
        typical: the data on whose validation rows the entropy for `other` is computed.
        sbc: the number of samples for each row, 0 for no SBC.
    """
    x, context = held_out(flow, data, split)
    weights = weights_of(data, split)
    check_fits(flow, data, options["draws"])
    begun = time.perf_counter()
    with phase(f"scoring the {split} set"):
        scores, settings = scored(flow, x, context, split, options)
    log_p = scores.log_p
    nll, nll_stderr, bits = -float(average(log_p, weights)), stderr(log_p, weights), flow.bits_per_nat
    truth = kl_to_truth(data, x, log_p, weights)
    where = "file" if split == "all" else f"{split} set"
    # rows with missing values may have been left out of a file
    kept = data.kept if isinstance(data, ScoredRows) else None
    numbers = torch.arange(len(x)) if kept is None else torch.from_numpy(kept.rows)
    concentrated = concentration(
        log_p,
        where,
        ("nats", 1.0) if bits is None else ("bits/dim", bits),
        numbers,
        weights,
        _cause(flow, data, x),
    )
    ordinary = ~torch.isin(numbers, torch.tensor(concentrated.rows, dtype=torch.int64))
    ordinary &= log_p.isfinite()
    if weights is not None:
        ordinary &= weights != 0
    of_ordinary = None if weights is None else weights[ordinary]
    subset = subset_of(flow, x, context, (~ordinary).nonzero().flatten(), None if thorough else FEW, weights)
    with phase("estimating the error of the NLL"):
        parts = budget(flow, subset, log_p, options["draws"], weights)
    simple = None
    if fitted is not None and len(flow.event_shape) == 1:
        with phase("fitting the baselines"):
            simple = baselines(
                fitted,
                dequantized_draws(flow, x, options),
                log_p,
                baseline_seconds,
                weights,
                context if flow.context else None,
            )
    d = math.prod(flow.event_shape)
    all_checks = [concentrated, check_baseline(nll, nll_stderr, (simple or {}).get(GAUSSIAN), d)]
    if thorough:
        with phase("checking the density"):
            all_checks += checks(flow, subset, parts, log_p[ordinary], (truth["kl"], truth["kl_stderr"]), of_ordinary)
    with phase("calibration"):
        calibrated, pit, context_pit = calibrate(flow, data, scores, context, options, thorough, weights)
    by_samples: tuple[Any, Any] = (None, None)
    if sbc:
        with phase("simulation-based calibration"):
            by_samples = simulation_calibration(flow, x, context, log_p, data.columns, sbc, options, weights)
    detected = None
    if other is not None:
        with phase(f"scoring {other[0]}"):
            detected = detect_ood(flow, x, log_p, other, typical, options, weights)
    with phase("round trip"):
        round_trip = roundtrip_error(flow, subset.x, subset.context)
    with phase("scoring the members of weight 0"):
        members = score_members(flow, scores.members, x, context, options, weights)
    result = Evaluation(
        nll=nll,
        nll_stderr=nll_stderr,
        n=len(x),
        n_effective=None if weights is None else effective_rows(weights),
        split=split,
        step=step,
        bits_per_dim=None if bits is None else bits * nll,
        **truth,
        **settings,
        solver_error=None if flow.solver is None else parts.solver,
        roundtrip_error=round_trip,
        total_seconds=time.perf_counter() - begun,
        budget=parts,
        checks=tuple(check for check in all_checks if check is not None),
        calibration=calibrated,
        ood=None if detected is None else detected[0],
        baselines=simple,
        **members,
        bits_per_nat=bits,
        **row_errors_of(scores.error, parts, weights),
        scores=log_p,
        sets=None if detected is None else detected[1],
        pit=pit,
        sbc=by_samples[0],
        ranks=by_samples[1],
        context_pit=context_pit,
    )
    for check in result.failed:
        log.warning("%s: %s", check.label, check.message)
    warn_if_better(nll, nll_stderr, simple or {}, d)
    if len(flow.event_shape) == 1:
        # latents of images are rarely calibrated
        warn_if_miscalibrated(calibrated.by_context)
    return result


def row_errors_of(error: Tensor, parts: Budget, weights: Tensor | None = None) -> dict[str, Any]:
    """Returns the attributes of an `Evaluation` that describe the errors of rows.

    The noise of the trace is added to the errors. In the 99th percentile and the worst error, rows without a finite
    error are left out.

    Args:
        error: the errors without this noise, see `Scores`, (n,).
        parts: the error budget. Its trace error is the error of the mean over all rows.
        weights: the weights of the rows, (n,), or None.
    """
    n = len(error) if weights is None else effective_rows(weights)
    errors = error + COVERED * parts.trace * math.sqrt(n)
    known = errors[errors.isfinite()]
    found = RowError(float(np.quantile(known.numpy(), 0.99)), float(known.max())) if len(known) else None
    return {"row_error": found, "errors": errors}


def weights_of(data: Dataset, split: str) -> Tensor | None:
    """Returns the weights of a set, (n,), or None.

    Raises:
        DataError: weights whose sum is not positive.
    """
    weights = data.split_weights(split)
    if weights is not None and not float(weights.sum()) > 0:
        raise DataError(
            f"the weights of the {len(weights):,} rows have the sum {float(weights.sum()):g}, but it must be positive"
        )
    return weights


def dequantized_draws(flow: Density, x: Tensor, options: Mapping[str, Any]) -> list[Tensor]:
    """Returns the points at which baselines are scored: x (n, d), or x + u_k for each noise draw on whole numbers.

    The noise is the same as in `score_rows`.

    Args:
        options: batch size, draws and seed: arguments of `log_probs`.
    """
    if not flow.integer_valued:
        return [x]
    size = options["batch_size"] or rows_at_a_time(flow.event_shape)
    parts = dequantized_parts(flow, x, size, options["draws"], options["seed"])
    return [torch.cat(one) for one in zip(*parts, strict=True)]


def scored(
    flow: Density, x: Tensor, context: Tensor | None, split: str, options: Mapping[str, Any]
) -> tuple[Scores, dict[str, Any]]:
    """Scores a set x (n, *event_shape). Also returns the settings of the computation, for eval.json.

    Args:
        options: batch size, draws and seed: arguments of `log_probs`.
    """
    begun = time.perf_counter()
    with record_solves() as solves:
        found = score_rows(flow, x, context, unsolved=UNSOLVED, **options)
    check_some_finite(found.log_p, split)
    seconds = time.perf_counter() - begun
    rule, estimated = trace_rule(flow), estimates_trace(flow)
    settings = {
        "trace": "hutchinson" if estimated else "exact",
        "noise_samples": rule.noise_samples if rule is not None and estimated else None,
        "dequantization_samples": options["draws"] if flow.integer_valued else None,
        "solver": None if flow.solver is None else flow.solver.describe(),
        "nfe": nfe_of_pass(flow, solves),
        "seconds": seconds,
        "device": str(flow.like.device),
        "dtype": str(flow.like.dtype).removeprefix("torch."),
    }
    return found, settings


def score_members(
    flow: Density,
    log_p: Tensor,
    x: Tensor,
    context: Tensor | None,
    options: Mapping[str, Any],
    weights: Tensor | None = None,
) -> dict[str, Any]:
    """Returns the attributes of an `Evaluation` that describe the members of an ensemble.

    This function scores only the members of weight 0. A member whose ODE cannot be solved gets NaN for all rows.

    Args:
        log_p: log p of the members with a positive weight, (n, M).
        options: batch size, draws and seed: arguments of `log_probs`.
        weights: the weights of the rows, (n,), or None.
    """
    if not isinstance(flow, Ensemble):
        return {"members": None, "spread": None, "member_scores": None}
    columns, active = [], iter(log_p.T)
    for member, weight in zip(flow.members, flow.weights, strict=True):
        if weight > 0:
            columns.append(next(active))
            continue
        try:
            columns.append(log_probs(cast(Flow, member), x, context, **options))
        except SolverError:
            columns.append(torch.full((len(x),), torch.nan, dtype=torch.float64))
    named = zip(flow.names, flow.weights, columns, strict=True)
    return {
        "members": tuple(
            Member(name, weight, -float(average(one, weights)), stderr(one, weights)) for name, weight, one in named
        ),
        "spread": spread(flow, log_p, weights),
        "member_scores": torch.stack(columns, 1),
    }


def spread(ensemble: Ensemble, log_p: Tensor, weights: Tensor | None = None) -> float | None:
    """Returns `row_spread` averaged over rows, for log p (n, M) of the members with a positive weight.

    Args:
        weights: the weights of the rows, (n,), or None.
    """
    each = row_spread(log_p, [weight for weight in ensemble.weights if weight > 0])
    kept = each.isfinite()
    each, weights = each[kept], None if weights is None else weights[kept]
    return float(average(each, weights)) if len(each) and log_p.shape[1] > 1 else None


def row_spread(log_p: Tensor, weights: Sequence[float]) -> Tensor:
    """Returns the weighted standard deviation of log p between the members of an ensemble for each row, (n,).

    It is NaN if log p of a member with a positive weight is not finite.

    Args:
        log_p: log p of the members, (n, M).
        weights: the M weights, which sum to 1.
    """
    active = [i for i, weight in enumerate(weights) if weight > 0]
    log_p, w = log_p[:, active], log_p.new_tensor([weights[i] for i in active])
    mean = (log_p * w).sum(1, keepdim=True)
    return ((log_p - mean).square() * w).sum(1).sqrt()


def calibrate(
    flow: Density,
    data: Dataset,
    scores: Scores,
    context: Tensor | None,
    options: Mapping[str, Any],
    thorough: bool,
    weights: Tensor | None = None,
) -> tuple[Calibration, dict[str, Tensor], tuple[tuple[str, Tensor], ...]]:
    """Tests the calibration, for a conditional flow also by context.

    Args:
        context: the context of the scored rows, or None.
        weights: the weights of the scored rows, (n,), or None.

    Returns:
        (result of the test, transforms for the figure, `Evaluation.context_pit`).
    """
    n = len(scores.log_p)
    if isinstance(flow, Flow):
        shown = latent_rows(n)
        given = None if context is None else flow.features(context[shown].to(flow.like.device))
        of_rows = None if weights is None else weights[shown]
        found, pit = calibration(scores.z, flow.base, given, of_rows)
        transforms_of = latent_transforms(scores.z, flow, given, shown, of_rows)
    else:
        ranked = log_p_of_samples(flow, scores.log_p, context, options, thorough)
        of_rows = None if weights is None else weights[:: math.ceil(n / len(ranked[0]))]
        found, pit = density_calibration(*ranked, of_rows)
        transforms_of = rank_transforms(*ranked, n, of_rows)
    if context is None:
        return found, pit, ()
    groups = context_groups(*context_table(flow, context.cpu(), data), weights)
    by_context, context_pit = calibration_by_context(groups, scores.log_p, transforms_of, weights)
    return replace(found, by_context=by_context), pit, context_pit


def latent_transforms(
    z: Tensor, flow: Flow, context: Tensor | None, latents: slice, weights: Tensor | None = None
) -> Callable[[Tensor], Transformed]:
    """Returns the argument `transforms_of` of `calibration_by_context` for a flow.

    Args:
        z: the latents, (m, *event_shape).
        context: the result of `Flow.features` for the rows of the latents.
        latents: the rows that have latents.
        weights: the weights of these rows, (m,), or None.
    """
    known = ~z.isnan().flatten(1).any(1)
    if weights is not None:
        known &= weights != 0
        weights = weights[known]
    given = None if context is None else context[known.to(context.device)]
    u = transforms(z[known], flow.base, given) if known.any() else z.double().flatten(1)[:0]

    def of(rows: Tensor) -> Transformed:
        here = rows[latents][known]
        of_here = None if weights is None else weights[here]
        return Transformed(u[here], of_here, int(here.sum()) if of_here is None else effective_rows(of_here))

    return of


def rank_transforms(
    log_p: Tensor, of_samples: Tensor, n: int, weights: Tensor | None = None
) -> Callable[[Tensor], Transformed]:
    """Returns the argument `transforms_of` of `calibration_by_context` for an ensemble.

    Args:
        log_p, of_samples: see `log_p_of_samples`.
        n: the number of all rows.
        weights: the weights of the rows of `log_p`, or None.
    """
    every = math.ceil(n / len(log_p))
    samples = of_samples.view(-1, len(log_p))

    def of(rows: Tensor) -> Transformed:
        ranked = rows[::every]
        of_ranked = None if weights is None else weights[ranked]
        found = density_ranks(log_p[ranked], samples[:, ranked].flatten(), of_ranked)
        return found._replace(u=found.u.unsqueeze(1))

    return of


def log_p_of_samples(
    flow: Density, log_p: Tensor, context: Tensor | None, options: Mapping[str, Any], thorough: bool
) -> tuple[Tensor, Tensor]:
    """Returns log p of k evenly spaced rows, (k,), and of RANKED_SAMPLES k samples of the flow, in rounds of k.

    In each round, there is one sample with the context of each row.

    Args:
        log_p: log p of the scored rows, (n,).
        context: the context of the scored rows, or None.
        options: batch size, draws and seed: arguments of `log_probs`.
        thorough: if false, a quarter of the rows is used.
    """
    every = math.ceil(len(log_p) / (RANKED if thorough else RANKED // 4))
    log_p = log_p[::every]
    context = None if context is None else torch.cat([context[::every]] * RANKED_SAMPLES)
    with seeded(options["seed"], flow.like.device), torch.no_grad():
        samples = flow.sample(RANKED_SAMPLES * len(log_p), context=context)
    if flow.integer_valued:
        samples = flow.quantized(samples)
    return log_p, score_rows(flow, samples, context, latents=0, unsolved=UNSOLVED, **options).log_p


def kl_to_truth(data: Dataset, x: Tensor, log_p: Tensor, weights: Tensor | None = None) -> dict[str, Any]:
    """Returns entropy, KL and the standard error of the KL in nats; None if the true density is unknown.

    KL(true || flow) = mean(log p_true(x) - log p(x)) over the rows x (n, *event_shape), where log_p (n,) is log p(x).
    The mean is weighted if there are weights (n,).
    """
    true = data.log_prob(x)
    gap = None if true is None else true.cpu() - log_p
    kl = (None, None) if gap is None else (float(average(gap, weights)), stderr(gap, weights))
    return {"entropy": data.entropy, "kl": kl[0], "kl_stderr": kl[1]}


def detect_ood(
    flow: Density,
    x: Tensor,
    log_p: Tensor,
    other: Other,
    trained_on: Dataset | None,
    options: Mapping[str, Any],
    weights: Tensor | None = None,
) -> tuple[OODDetection, tuple[Tensor, Tensor]]:
    """Separates x (n, *event_shape) from `other` by log p.

    For a flow with context columns, this is log p(x | c) with the context of each row. Labels are not used.

    Args:
        log_p: log p of x, (n,). For a flow with labels, log p of x is computed again without labels.
        trained_on: the data on whose validation set H of |log p + H| is computed. None means that H is computed on x.
        options: batch size, draws and seed: arguments of `log_probs`.
        weights: the weights of x, (n,), or None. The rows of `other` have equal weights.

    Returns:
        (areas under the ROC curves, log p of both sets, (n,) and (m,)). With weights, the first set is represented by
        quantiles of equal weight.
    """

    def scores(rows: Tensor, context: Tensor | None = None) -> Tensor:
        return score_rows(flow, rows, context, latents=0, unsolved=UNSOLVED, **options).log_p

    inside = log_p if flow.classes is None else scores(x)
    typical, of, of_typical = inside, "scored rows", weights
    if trained_on is not None:
        of = "validation set"
        if trained_on.val is not x:
            rows, context = held_out(flow, trained_on, "val") if flow.context else (trained_on.val, None)
            typical = scores(rows[:MOST_TYPICAL], None if context is None else context[:MOST_TYPICAL])
            of_typical = None if trained_on.val_weights is None else trained_on.val_weights[:MOST_TYPICAL]
    context = flow.context_of(other[2], other[1]) if flow.context and len(other) == 3 else None
    outside = scores(other[1], context)
    finite = typical.isfinite()
    entropy = -float(average(typical[finite], None if of_typical is None else of_typical[finite]))
    found = ood_detection(other[0], inside, outside, entropy, of, weights)
    return found, (inside if weights is None else equal_rows(inside, weights, len(inside)), outside)


def check_fits(flow: Density, data: Dataset, dequantization_samples: int = 1) -> None:
    """Checks that data fit a flow.

    Raises:
        DataError: samples of another shape, or integers instead of real numbers or the reverse.
        ConfigError: several dequantization samples for a flow that is not integer-valued.
    """
    if tuple(data.event_shape) != flow.event_shape:
        raise DataError(
            f"the flow was made for samples of shape {flow.event_shape}, but these samples have shape "
            f"{tuple(data.event_shape)}"
        )
    if (flow.integer_valued, flow.levels, flow.noisy) != (data.integer_valued, data.levels, data.noisy):
        raise DataError(
            f"the flow was made for {_kind(flow.integer_valued, flow.levels, flow.noisy)}, but these data have "
            f"{_kind(data.integer_valued, data.levels, data.noisy)}; change data.dequantize or data.levels"
        )
    kinds = [[(one.kind, one.categories) for one in each.types] for each in (flow, data)]
    if kinds[0] != kinds[1]:
        types = [", ".join(map(str, each.types)) or "real" for each in (flow, data)]
        raise DataError(
            f"the flow was made for columns of the types {types[0]}, but these data have {types[1]}, or other "
            "categories; change data.types"
        )
    if dequantization_samples > 1 and not flow.integer_valued:
        why = "the noise on its columns is drawn once" if flow.noisy else "no noise is added to its data"
        raise ConfigError(
            f"dequantization_samples={dequantization_samples}: this flow is not integer-valued, and {why}; omit this "
            "setting"
        )


@torch.no_grad()
def roundtrip_error(flow: Density, x: Tensor, context: Context = None) -> float:
    """Returns max |x - forward(inverse(x))| in data units. Whole numbers are first dequantized with seeded noise.

    The error of an angle is the shortest arc.
    For an ensemble, the largest error of a member is returned.
    """
    with seeded(0, flow.like.device):
        x = flow.dequantized(x)
        return max(
            float(differences(flow.types, x, one(one.inverse(x, context), context)).abs().max()) for one in flow.flows
        )


def _cause(flow: Density, data: Dataset, x: Tensor) -> str | None:
    """Returns which columns of x (n, d) have values outside of the range of their type; None if there are none."""
    if not flow.types:
        return None
    names = data.columns or default_names(range(len(flow.types)))
    outside = [
        f"{name!r} ({one})"
        for name, one, column in zip(names, flow.types, x.unbind(1), strict=True)
        if not one.contains_noisy(column).all()
    ]
    return f"values outside of the range of {first_of(outside[:MOST_NAMED], len(outside))}" if outside else None


def _kind(integer_valued: bool, levels: int | None, noisy: tuple[int, ...]) -> str:
    """Describes the type of samples for messages."""
    if not integer_valued:
        return f"real numbers, with whole numbers in columns {as_ranges(noisy)}" if noisy else "real numbers"
    return "whole numbers" if levels is None else f"whole numbers from 0 to {levels - 1}"
