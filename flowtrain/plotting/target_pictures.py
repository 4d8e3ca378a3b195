"""Draws the figures of a flow that was trained on a target."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowtrain.data.base import step_generator
from flowtrain.data.targets.base import Target, TargetData
from flowtrain.evaluation.log_likelihood import marginal
from flowtrain.evaluation.log_weights import WeightedSamples, weighted_samples
from flowtrain.evaluation.pareto import weight_tail
from flowtrain.evaluation.target_result import TargetEvaluation
from flowtrain.evaluation.targets import nearest_modes
from flowtrain.flow import Density, Flow
from flowtrain.plotting.corner import draw_corner
from flowtrain.plotting.curves import draw_curves
from flowtrain.plotting.drawing import drawing, warn_if_plotting_fails
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import finite
from flowtrain.plotting.scales import MINUS
from flowtrain.plotting.target_figures import draw_modes, draw_target_1d, draw_target_2d, draw_weights
from flowtrain.plotting.transport_pictures import draw_transport_pictures
from flowtrain.utils.weighting import resample

# the number of samples of the flow that a figure draws if none are given
SAMPLES = 20_000
# the largest number of rows for which a density is computed at once
ROWS = 2000
# the random stream of exact samples
_EXACT = 0x74_61_72_6A
EXACT, RESAMPLED = "exact samples of the target", "samples weighted by p / q"


class Reference(NamedTuple):
    """Points x (N, d) that are distributed like a target, and their name for a legend."""

    x: Tensor
    name: str


def reference_of(target: Target, drawn: WeightedSamples) -> Reference:
    """Returns exact samples of a target. Without exact samples, it returns samples of a flow, resampled by weight.

    Args:
        drawn: samples of the flow with their log weights.
    """
    exact = target.sample(len(drawn.x), step_generator(0, _EXACT))
    if exact is not None:
        return Reference(exact, EXACT)
    log_w = drawn.log_w.nan_to_num(nan=-math.inf, posinf=-math.inf)
    # if all weights are 0, all samples are shown
    weights = torch.ones_like(log_w) if log_w.max() == -math.inf else (log_w - log_w.max()).exp()
    return Reference(drawn.x[resample(weights, seed=1)], RESAMPLED)


def as_data(flow: Density, target: Target) -> TargetData:
    """Returns a data set for figures of the transport. Its test rows are points of the target, see `reference_of`."""
    data = TargetData(target, n_val=2, n_test=2)
    target.to(flow.like.device)
    data.test = reference_of(target, weighted_samples(flow, target, SAMPLES, seed=0)).x.float()
    return data


def draw(
    flow: Density,
    target: Target,
    path: Path,
    title: str,
    samples: Tensor | None = None,
    log_scale: bool = False,
    options: PlotOptions = DEFAULT,
    drawn: WeightedSamples | None = None,
    log_z: float | None = None,
) -> None:
    """Draws a target beside a flow: the densities of one or two columns, or a corner plot of more columns.

    The axes contain the points and the modes of the target, and the samples of the flow.

    Args:
        samples: samples of the flow (M, d). None: half of those in `drawn`.
        log_scale: whether densities are shown on a logarithmic scale.
        drawn: samples of the flow with their weights. None: this function draws them.
        log_z: an estimate of log Z in nats, which normalizes the density of the target if its log Z is unknown. None:
            the estimate from `drawn`.
    """
    device, dtype = flow.like.device, flow.like.dtype
    target.to(device)
    with drawing(flow) as flow:
        if drawn is None:
            drawn = weighted_samples(flow, target, SAMPLES, seed=0)
        # the flow and the target are shown by different halves of the samples, so that their noise is independent
        halves = [WeightedSamples(*(values[i::2] for values in drawn)) for i in range(2)]
        reference = reference_of(target, halves[1])
        samples = halves[0].x if samples is None else samples.cpu()
        if target.log_z is not None:
            # the estimate is too small if the flow misses a mode
            log_z = target.log_z
        elif log_z is None:
            log_z = estimate_of(drawn)
        ends = [_ends(reference.x), _ends(samples)]
        if target.modes is not None:
            ends += [target.modes.cpu().double().amin(0, True), target.modes.cpu().double().amax(0, True)]
        given: dict[str, Any] = {"samples": samples, "cover": torch.cat(ends), "title": title}
        given |= {"options": options, "types": target.types}
        if target.dim > 2:
            names = reference.name, "samples"
            draw_corner(path, data=reference.x, columns=target.columns, names=names, **given)
            return

        def normalized(x: Tensor) -> Tensor:
            return in_parts(target, x.to(device, dtype)).cpu() - log_z

        given |= {"target": reference.x, "target_log_density": normalized, "log_scale": log_scale}
        given["log_density"] = lambda x: in_parts(partial(marginal, flow), x.to(device, dtype))
        if target.dim == 1:
            draw_target_1d(path, column=target.columns[0], **given)
        else:
            draw_target_2d(path, columns=target.columns, **given)


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns the values of a log density at x (B, d), (B,), computed for ROWS rows at a time."""
    return torch.cat([function(part) for part in torch.split(x, ROWS)])


def estimate_of(drawn: WeightedSamples) -> float:
    """Returns log mean(w), the estimate of log Z, in nats. 0 if it is not finite."""
    found = float(drawn.log_w.logsumexp(0)) - math.log(len(drawn.x))
    return found if math.isfinite(found) else 0.0


def _ends(x: Tensor) -> Tensor:
    """Returns the 0.5% and 99.5% quantiles of the finite rows of x (N, d), (2, d), float64. (0, d) without them."""
    kept = torch.from_numpy(finite("samples", x).values)
    return (
        torch.stack([kept.quantile(q, 0) for q in (0.005, 0.995)]) if len(kept) else x.new_empty(0, x.shape[1]).double()
    )


def shares_of(x: Tensor, modes: Tensor) -> list[float]:
    """Returns the share of points x (n, d) at each of k modes (k, d). A point belongs to the nearest mode."""
    counts = torch.bincount(nearest_modes(x, modes.detach().cpu().double()), minlength=len(modes))
    return (counts.double() / len(x)).tolist()


def _tail_of(drawn: WeightedSamples) -> float | None:
    """Returns the log weight at which the Pareto tail begins, in nats. None for too few samples."""
    log_w = drawn.log_w.nan_to_num(nan=-math.inf, posinf=-math.inf)
    tail = weight_tail((log_w - log_w.max()).exp())
    return None if tail is None or tail.cutoff <= 0 else math.log(tail.cutoff) + float(log_w.max())


def draw_target_figures(
    flow: Density,
    target: Target,
    result: TargetEvaluation,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    path_of: Callable[[str], Path],
    options: PlotOptions = DEFAULT,
    more: bool = True,
) -> list[Path]:
    """Draws all figures of a flow that was trained on a target, and of the evaluation of the flow.

    These are the training curves, the target beside the flow, the importance weights, the samples by mode if the modes
    are known, and the transport of a flow of two columns. If a figure fails, a warning is logged, and the other figures
    are drawn.

    Args:
        rows: the rows of metrics.jsonl. If empty, the training curves are not drawn.
        title: the model, the target and the result.
        path_of: returns the path of a figure from its name.
        more: whether the transport is drawn.

    Returns:
        The files that were written.
    """
    written: list[Path] = []
    if rows:
        with warn_if_plotting_fails("curves"):
            lowest = None if target.log_z is None else -target.log_z
            kept = None if result.members else result.step
            words = {"name": "negative ELBO", "lowest": f"{MINUS}log Z of the target"}
            draw_curves(path_of("curves"), rows=rows, title=title, entropy=lowest, kept=kept, options=options, **words)
            written += options.files(path_of("curves"))
    drawn = result.drawn
    with warn_if_plotting_fails("target"):
        draw(flow, target, path_of("target"), title, options=options, drawn=drawn, log_z=result.log_z)
        written += options.files(path_of("target"))
    with warn_if_plotting_fails("weights"):
        draw_weights(
            path_of("weights"),
            log_w=drawn.log_w,
            log_z=result.log_z,
            ess=result.ess,
            pareto_k=result.pareto_k,
            tail=_tail_of(drawn),
            title=f"{title}, importance weights",
            options=options,
        )
        written += options.files(path_of("weights"))
    if result.mode_shares is not None and target.modes is not None:
        with warn_if_plotting_fails("modes"):
            exact = target.sample(len(drawn.x), step_generator(0, _EXACT))
            draw_modes(
                path_of("modes"),
                shares=result.mode_shares,
                true_shares=None if exact is None else shares_of(exact, target.modes),
                title=f"{title}, samples by mode",
                options=options,
            )
            written += options.files(path_of("modes"))
    if more and isinstance(flow, Flow) and target.dim == 2:
        data = TargetData(target, n_val=2, n_test=2)
        data.test = reference_of(target, drawn).x.float()
        written += draw_transport_pictures(flow, data, path_of, title, options, name="target")
    return written
