"""What is known of a flow's likelihoods: the numbers that the table, the JSON, the report and the figures show."""

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor

from flowtrain.evaluation.digits import brief, with_error


@dataclass(frozen=True)
class Budget:
    """What the error of an NLL is made of, each in nats per sample.

    Attributes:
        sampling: standard error over the rows, less what the trace's noise adds to it.
        trace: standard error from the noise of an estimated trace, by draws of it on a subset; 0 where it is exact.
        solver: change of the NLL when the tolerance is tightened tenfold, in float64 on a subset, whose own error is
            in it; 0 of a flow that solves no ODE, NaN where the field could not be solved so tightly.
        solver_per_row: RMS of that change of a row, the error of a single score.
        embedded: mean over the subset of what the solver itself estimates the error of the log-determinant's integral
            to be, whichever way; None where it gives no estimate.
        precision: the NLL in the flow's dtype beside float64, on the subset likewise; None of a flow in float64.
        dequantization_gap: how much lower the NLL is on the subset with ten times the draws of the noise inside the
            log: by at least so much does the bound lie above the NLL of the whole numbers. None of real numbers. One
            sided and no error of the bound itself, hence no part of `total`.
        rows: of that subset.
        total: sqrt(nll_stderr^2 + s^2 + precision^2), s the larger of `solver` and `embedded`: the error that is
            printed.
        interval: NLL -+ 1.96 total, which covers the flow's true NLL in 95 of 100 test sets.
    """

    sampling: float
    trace: float
    solver: float
    solver_per_row: float
    embedded: float | None
    precision: float | None
    dequantization_gap: float | None
    rows: int
    total: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Check:
    """One way in which a density can be found to be none.

    Attributes:
        value: what was measured; None where it was not.
        limit: what its error may be.
        passed: None where nothing was measured.
        message: the cause, of a check that failed; why, of one that was not made.
    """

    name: str
    value: float | None
    limit: float | None
    passed: bool | None
    message: str | None = None


@dataclass(frozen=True)
class Calibration:
    """Whether latents of the data look like draws from the base: each N(0, 1), and |z|^2 chi-square.

    Attributes:
        n: rows.
        statistic: the largest Kolmogorov-Smirnov distance sup_u |F_n(u) - u| of the probability integral transforms.
        worst: of which line, "z1" to "zd" or "radius".
        p_value: of a distance as large or larger somewhere, were the model the truth; Bonferroni over the lines.
        radius: the distance of "radius".
    """

    n: int
    statistic: float
    worst: str
    p_value: float
    radius: float


@dataclass(frozen=True)
class Separation:
    """How well likelihoods tell another set from this one; NLL in nats per sample.

    Attributes:
        name: the other set, `n` samples.
        infinite: how many of them have no finite log p; they count as the least likely.
        auroc: P(log p of the other set < log p of this one), ties counted half: -log p as a score of novelty.
        typicality_auroc: the same of |log p + entropy| (Nalisnick et al. 2019, Detecting out-of-distribution inputs to
            deep generative models using typicality).
        auroc_stderr, typicality_stderr: DeLong et al. 1988.
        entropy: the mean NLL of this set, which stands for the model's entropy.
    """

    name: str
    n: int
    infinite: int
    nll: float
    nll_stderr: float
    auroc: float
    auroc_stderr: float
    typicality_auroc: float
    typicality_stderr: float
    entropy: float


# what the figures take, and no table or JSON
PRIVATE = ("bits_per_nat", "scores", "sets", "pit")
# how wide the names before the lines of a table are
NAMES = 13


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
        solver_error: the change of the NLL when the tolerance is tightened tenfold, in float64 on a subset; None of a
            flow that solves no ODE.
        roundtrip_error: max |x - forward(inverse(x))| on it.
        seconds: of scoring; total_seconds: with the budget and the checks.
        scores: log p(x) of every row in the order of the set, (n,), float64.
        sets: log p of this set and of the one it is told from, (n,) and (m,), or None.
        pit: name -> probability integral transforms of latents, (rows,).
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
    dtype: str
    total_seconds: float
    budget: Budget
    checks: tuple[Check, ...]
    calibration: Calibration
    ood: Separation | None
    bits_per_nat: float | None = field(repr=False)
    scores: Tensor = field(repr=False)
    sets: tuple[Tensor, Tensor] | None = field(repr=False)
    pit: dict[str, Tensor] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the numbers above and the headline, checks by their name, and no arrays."""
        content = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in PRIVATE}
        content["checks"] = {c.name: {k: v for k, v in asdict(c).items() if k != "name"} for c in self.checks}
        return {**content, "headline": self.headline}

    @property
    def error(self) -> float:
        """The standard error of the NLL, in nats."""
        return self.budget.total

    @property
    def kl_error(self) -> float:
        """That of the KL: what is not sampling error is in it as in the NLL."""
        assert self.kl_stderr is not None
        return math.sqrt(max(0.0, self.budget.total**2 - self.nll_stderr**2) + self.kl_stderr**2)

    @property
    def headline(self) -> str:
        """The NLL to the digits that its error leaves it: "NLL 2.402 +- 0.006 nats (solver 3e-6, trace exact)"."""
        return f"NLL {self.amount} ({', '.join(self._remarks())})"

    @property
    def amount(self) -> str:
        """As in the headline, "2.402 +- 0.006 nats"; images in bits/dim."""
        if self.bits_per_dim is None:
            return f"{with_error(self.nll, self.error)} nats"
        return f"{with_error(self.bits_per_dim, self.unit[1] * self.error)} bits/dim"

    @property
    def unit(self) -> tuple[str, float]:
        """What the NLL is told in, and how many of it a nat is: bits/dim of images, else nats."""
        return ("nats", 1.0) if self.bits_per_nat is None else ("bits/dim", self.bits_per_nat)

    @property
    def rows_words(self) -> str:
        """What was evaluated: the test set, or all rows of a file."""
        return "all rows" if self.split == "all" else f"{self.split} set"

    @property
    def words(self) -> str:
        """As a title has it: the amount, and the KL where it is known."""
        if self.kl is None or self.kl_stderr is None:
            return f"NLL {self.amount}"
        return f"NLL {self.amount}, KL {with_error(self.kl, self.kl_error)}"

    def _remarks(self) -> list[str]:
        unit = self.unit[1]
        parts = []
        if self.solver is None:
            parts.append("log-det exact")
        else:
            parts.append(f"solver {brief(unit * self.budget.solver)}")
            parts.append("trace exact" if self.trace == "exact" else f"trace {brief(unit * self.budget.trace)}")
        if self.budget.dequantization_gap is not None:
            parts.append(f"dequantization gap {brief(unit * self.budget.dequantization_gap)}")
        return parts

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if check.passed is False]

    def rows(self) -> list[tuple[str, str]]:
        """(name, words) of everything, the headline first."""
        rows = [("NLL", self.headline.removeprefix("NLL ")), ("of", f"{self.rows_words}, n = {self.n}")]
        if self.bits_per_dim is not None:
            rows.append(("", f"{with_error(self.nll, self.error)} nats"))
        if self.kl is not None and self.kl_stderr is not None:
            rows.append(("KL", f"{with_error(self.kl, self.kl_error)} nats  (entropy {self.entropy:.4f})"))
        rows.append(("error", self._error_words()))
        if self.dequantization_samples is not None:
            gap = self.budget.dequantization_gap
            lower = "" if gap is None else f", {brief(gap)} nats lower with ten times as many"
            rows.append(("dequantized", f"{self.dequantization_samples} uniform noise draws: a bound{lower}"))
        if self.solver is not None:
            s = self.solver
            how = f"rtol {s['rtol']:g}, atol {s['atol']:g}" if s["rtol"] else f"steps of {s['step_size']:g}"
            noise = "" if self.noise_samples is None else f", {self.noise_samples} noise draws"
            rows.append(("log-det", f"{self.trace} trace{noise}, {s['method']}, {how}, NFE {self.nfe:.0f}"))
        rows.append(("round trip", f"{self.roundtrip_error:.1e}"))
        rows += [("checks", words) for words in self._check_words()]
        c = self.calibration
        rows.append(("latents", f"KS {c.statistic:.3f} ({c.worst}), p {p_words(c.p_value)}; radius {c.radius:.3f}"))
        if self.ood is not None:
            o = self.ood
            finite = f" of the {o.n - o.infinite} with one" if o.infinite else ""
            rows.append(("novelty", f"{o.name}, n = {o.n}: NLL {with_error(o.nll, o.nll_stderr)} nats{finite}"))
            rows.append(("", f"AUROC of -log p {with_error(o.auroc, o.auroc_stderr)}"))
            rows.append(("", f"AUROC of |log p + H| {with_error(o.typicality_auroc, o.typicality_stderr)}"))
        took = f"{self.seconds:.1f} s of scoring, {self.total_seconds:.1f} s in all"
        rows.append(("time", f"{took}, on {self.device} in {self.dtype}, checkpoint of step {self.step}"))
        return rows

    def _error_words(self) -> str:
        b = self.budget
        parts = [f"sampling {brief(b.sampling)}" if math.isfinite(b.sampling) else "sampling unknown, one row"]
        if self.solver is not None:
            own = "" if b.embedded is None else f" ({brief(b.embedded)} by its own estimate)"
            parts += [f"trace {brief(b.trace)}", f"solver {brief(b.solver)}{own}"]
        if b.precision is not None:
            parts.append(f"{self.dtype} {brief(b.precision)}")
        return f"{', '.join(parts)} nats"

    def _check_words(self) -> list[str]:
        good = [f"{c.name} {brief(c.value)}" for c in self.checks if c.passed and c.value is not None]
        lines = [f"passed: {', '.join(good)}"] if good else []
        lines += [f"FAILED: {c.name} {c.value:.2g}, at most {c.limit:.2g}" for c in self.failed]
        return lines + [f"not made: {c.name}: {c.message}" for c in self.checks if c.passed is None]

    def table(self) -> str:
        """A few lines for a terminal."""
        return "\n".join(f"{name:>{NAMES}}  {value}" for name, value in self.rows())


def p_words(p: float) -> str:
    """What a p-value is equal to, to two digits, or less than."""
    return "< 1e-6" if p < 1e-6 else f"= {p:.2g}"


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
