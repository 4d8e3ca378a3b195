"""Likelihoods on held-out data, with what is known of their error."""

import copy
import logging
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.errors import ConfigError, DataError
from flowtrain.flow import Flow, Label
from flowtrain.scores import check_finite, estimates_trace, held_out, log_probs, nfe_of_pass, trace_rule
from flowtrain.seeding import seeded
from flowtrain.solvers import record_solves

log = logging.getLogger("flowtrain")

# a solver error below this many nats is not worth a warning, however small the sampling error
SOLVER_ERROR = 0.01


@dataclass(frozen=True)
class Evaluation:
    """What `floweval` reports, in the order of eval.json. NLL, entropy and KL in nats per sample.

    Attributes:
        nll_stderr: over the rows, each with noise of its own where the trace is estimated or the data dequantized, so
            that it covers both.
        bits_per_dim: of images, nll / (D log 2).
        kl: the mean of log p_true - log p_model on the same points.
        dequantization_samples: of whole numbers, how many draws of the noise are averaged inside the log; with 1 the
            NLL is the plain bound.
        solver_error: the change of the NLL when the tolerance is tightened tenfold, in float64 on a subset.
        roundtrip_error: max |x - forward(inverse(x))| on it.
    """

    nll: float
    nll_stderr: float
    n: int
    split: str
    step: int
    bits_per_dim: float | None
    entropy: float | None
    kl: float | None
    kl_stderr: float | None
    trace: str
    noise_samples: int | None
    dequantization_samples: int | None
    solver: dict[str, Any] | None
    nfe: float | None
    solver_error: float | None
    roundtrip_error: float
    seconds: float
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """A few lines for a terminal."""
        rows = [("NLL", f"{self.nll:.4f} +- {self.nll_stderr:.4f} nats  ({self.split}, n = {self.n})")]
        if self.bits_per_dim is not None:
            stderr = self.nll_stderr * self.bits_per_dim / self.nll
            rows.insert(0, ("bits/dim", f"{self.bits_per_dim:.4f} +- {stderr:.4f}"))
        if self.dequantization_samples is not None:
            rows.append(("dequantized", f"{self.dequantization_samples} uniform noise draws: a bound"))
        if self.kl is not None:
            rows.append(("KL", f"{self.kl:.4f} +- {self.kl_stderr:.4f} nats  (entropy {self.entropy:.4f})"))
        noise = "" if self.noise_samples is None else f", {self.noise_samples} noise draws"
        if self.solver is None:
            rows.append(("log-det", "exact, discrete flow"))
        else:
            s = self.solver
            how = f"rtol {s['rtol']:g}, atol {s['atol']:g}" if s["rtol"] else f"steps of {s['step_size']:g}"
            rows.append(("log-det", f"{self.trace} trace{noise}, {s['method']}, {how}, NFE {self.nfe:.0f}"))
            rows.append(("solver error", f"{self.solver_error:.1e} nats"))
        rows.append(("round trip", f"{self.roundtrip_error:.1e}"))
        rows.append(("time", f"{self.seconds:.1f} s on {self.device}, checkpoint of step {self.step}"))
        return "\n".join(f"{name:>13}  {value}" for name, value in rows)


def evaluate(
    flow: Flow,
    data: Dataset,
    split: str = "test",
    step: int = 0,
    batch_size: int | None = None,
    dequantization_samples: int = 1,
) -> Evaluation:
    """Scores a flow in evaluation mode on a held-out set of `data`.

    Raises:
        ConfigError: several dequantization samples of data that are not whole numbers.
        DataError: data of another shape or kind than the flow's.
        NonFiniteError: a log-likelihood that is NaN or infinite, naming the first row.
    """
    x, label = held_out(flow, data, split)
    check_fits(flow, data, dequantization_samples)
    flow.eval()
    begun = time.perf_counter()
    with record_solves() as solves:
        log_p = log_probs(flow, x, label, batch_size, dequantization_samples)
    check_finite(log_p, split)
    seconds = time.perf_counter() - begun
    true = data.log_prob(x)
    gap = None if true is None else true.cpu() - log_p
    rows = rows_of_checks(flow.event_shape)
    subset, few = x[:rows], None if label is None else label[:rows]
    rule, estimated = trace_rule(flow), estimates_trace(flow)
    bits, nll = flow.bits_per_nat, -log_p.mean().item()
    result = Evaluation(
        nll=nll,
        nll_stderr=_stderr(log_p),
        n=len(x),
        split=split,
        step=step,
        bits_per_dim=None if bits is None else bits * nll,
        entropy=data.entropy,
        kl=None if gap is None else gap.mean().item(),
        kl_stderr=None if gap is None else _stderr(gap),
        trace="hutchinson" if estimated else "exact",
        noise_samples=rule.noise_samples if rule is not None and estimated else None,
        dequantization_samples=dequantization_samples if flow.discrete else None,
        solver=None if flow.solver is None else flow.solver.describe(),
        nfe=nfe_of_pass(flow, solves),
        solver_error=solver_error(flow, subset, few),
        roundtrip_error=roundtrip_error(flow, subset, few),
        seconds=seconds,
        device=str(flow.like.device),
    )
    warn_of(result)
    return result


def check_fits(flow: Flow, data: Dataset, dequantization_samples: int = 1) -> None:
    """Refuses data that are not of the flow's kind; see `evaluate`."""
    if tuple(data.event_shape) != flow.event_shape:
        raise DataError(
            f"the flow was trained on samples of shape {flow.event_shape}; this data has {tuple(data.event_shape)}"
        )
    if flow.discrete != data.discrete or flow.levels != data.levels:
        raise DataError(
            f"the flow was trained on {_kind(flow.discrete, flow.levels)}; this data has "
            f"{_kind(data.discrete, data.levels)} (data.dequantize, data.levels)"
        )
    if dequantization_samples > 1 and not flow.discrete:
        raise ConfigError(
            f"dequantization_samples={dequantization_samples}: this flow is over real numbers, to which no noise is "
            "added; leave it out"
        )


def rows_of_checks(event_shape: tuple[int, ...]) -> int:
    """How many samples the costly checks take, the solver's error and the round trip."""
    return max(50, min(500, 20_000 // math.prod(event_shape)))


def warn_of(result: Evaluation) -> None:
    """Says so when the likelihood is the solver's doing: a field can learn to please a coarse solver."""
    if result.solver_error is not None and not result.solver_error <= max(result.nll_stderr, SOLVER_ERROR):
        log.warning(
            "the NLL changes by %.2g nats when the solver's tolerance is tightened tenfold: it is not to be trusted. "
            "Evaluate with a smaller solver.rtol (or solver.step_size), and train with it.",
            result.solver_error,
        )
    if result.kl is not None and result.kl_stderr is not None and result.kl < -3 * result.kl_stderr:
        log.warning("the KL is negative beyond its error, which no density can be: log p of this flow is wrong")


def solver_error(flow: Flow, x: Tensor, label: Tensor | None = None) -> float | None:
    """|NLL(tolerance) - NLL(tolerance / 10)| in nats on x, in float64 so that rounding stays out of it."""
    if flow.solver is None:
        return None
    exact = copy.deepcopy(flow).double()
    solver = exact.solver
    assert solver is not None
    tighter: dict[str, Any] = {
        "rtol": solver.rtol / 10,
        "atol": solver.atol / 10,
        "max_nfe": 100 * solver.max_nfe,
    }
    if solver.step_size is not None:
        tighter["step_size"] = solver.step_size / 10
    as_is = log_probs(exact, x, label).mean()
    with solver.using(**tighter):
        return abs(float(log_probs(exact, x, label).mean() - as_is))


@torch.no_grad()
def roundtrip_error(flow: Flow, x: Tensor, label: Label = None) -> float:
    """max |x - forward(inverse(x))| in data units, whole numbers dequantized first by seeded noise."""
    with seeded(0, flow.like.device):
        x = flow.dequantized(x)
        return float((x - flow(flow.inverse(x, label), label)).abs().max())


def _kind(discrete: bool, levels: int | None) -> str:
    """What samples are, in words."""
    if not discrete:
        return "real numbers"
    return "whole numbers" if levels is None else f"whole numbers from 0 to {levels - 1}"


def _stderr(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
