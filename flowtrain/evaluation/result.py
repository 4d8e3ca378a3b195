"""The result of an evaluation, as a table, as JSON and as one line of text."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor

from flowtrain.utils.formatting import brief, counted, with_error


@dataclass(frozen=True)
class RowError:
    """The errors of log p of single rows, in nats, see `flowtrain.ode.row_errors`.

    If the trace is estimated, they include 1.96 standard deviations of its noise, measured on a subset.

    Attributes:
        p99: the 99th percentile over the rows.
        worst: the largest error.
    """

    p99: float
    worst: float


@dataclass(frozen=True)
class Bias:
    """The bias of a solver with fixed steps against an accurate adaptive solve, on a subset, in nats.

    Attributes:
        nll: mean of log p by the adaptive solve minus log p by the fixed steps. It is positive if the NLL is too high.
        stderr: the standard error of `nll`.
        per_row: the RMS of the difference over the rows.
    """

    nll: float
    stderr: float
    per_row: float


@dataclass(frozen=True)
class Budget:
    """The error budget: the parts of the error of an NLL, each in nats per sample.

    Attributes:
        sampling: standard error over the rows, excluding the noise of the trace.
        trace: standard error from the noise of an estimated trace, measured by several draws on a subset of the rows.
            It is 0 if the trace is exact.
        solver: change of the NLL when the tolerance is tightened tenfold, in float64 on the subset. With mean change
            m and its standard error s over the subset, this is sqrt(m^2 + s^2). It is 0 for a flow that solves no ODE.
            It is NaN if the tight solve failed.
        solver_per_row: RMS over the rows of the change of log p: the solver error of a single score.
        embedded: mean over the subset of the solver's own estimate of the absolute error of the log-determinant; None
            if the solver gives no estimate.
        precision: the difference between the NLL in the dtype of the flow and in float64, measured like `solver`; None
            for a flow in float64.
        dequantization_gap: the decrease of the NLL on the subset with ten times as many noise draws inside the log. The
            reported bound is higher than the NLL of the whole numbers by at least this gap. None for real numbers. The
            gap is not included in `total`, because it is not an error of the bound.
        rows: the number of rows of the subset.
        bias: for a solver with fixed steps, its bias against an adaptive solve. Else None, and if the adaptive solve
            fails. It is not included in `total`, which includes `solver`.
        total: sqrt(nll_stderr^2 + s^2 + precision^2) with s = max(solver, embedded). This is the printed error.
        interval: NLL -+ 1.96 total, a 95% confidence interval of the true NLL of the flow.
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
    bias: Bias | None = None


# Names of checks in tables, if they differ from the names in JSON
LABELS = {"own samples": "log p of own samples", "baseline": "worse than baseline"}


@dataclass(frozen=True)
class Check:
    """A measured property of a density or of its likelihoods, and the limit it must not exceed.

    Attributes:
        value: the measured value. None if the check was not made.
        limit: the largest value that passes.
        passed: whether the check passed. None if the check was not made.
        message: the cause if the check failed, or the reason why it was not made.
    """

    name: str
    value: float | None
    limit: float | None
    passed: bool | None
    message: str | None = None

    @property
    def label(self) -> str:
        """The name in tables; `name` is the key in JSON."""
        return LABELS.get(self.name, self.name)


@dataclass(frozen=True)
class OutlierCheck(Check):
    """Whether a few outlier rows dominate the NLL.

    Attributes:
        value: the fraction of the variance of the NLL that a few rows far from the others carry, see
            `flowtrain.evaluation.outliers`; 1 if log p of a row is not finite.
        rows: the positions of these rows in the scored set, from 0; at most the first 1,000.
        count: the number of these rows.
        nll_without, nll_without_stderr: the NLL of the other rows and its standard error, in nats.
    """

    rows: tuple[int, ...] = ()
    count: int = 0
    nll_without: float | None = None
    nll_without_stderr: float | None = None


@dataclass(frozen=True)
class Baseline:
    """The likelihood of a simple density on the same rows, in nats per sample.

    Attributes:
        nll: the mean of -log p.
        nll_stderr: the standard error over the rows.
        seconds: the time to fit and score the baseline.
        worse: the NLL of the flow minus the NLL of the baseline.
        worse_stderr: the standard error of the paired difference over the rows.
        settings: the settings that were chosen on validation rows, such as "16 components".
    """

    nll: float
    nll_stderr: float
    seconds: float
    worse: float
    worse_stderr: float
    settings: str = ""

    def to_dict(self) -> dict[str, float]:
        """Returns the content for JSON."""
        return {"nll": self.nll, "nll_stderr": self.nll_stderr, "seconds": self.seconds}


@dataclass(frozen=True)
class Member:
    """A member of an ensemble, evaluated on the rows of the ensemble. NLL is in nats per sample.

    Attributes:
        path: the file of the member, or its name.
        weight: its weight in the ensemble.
        nll: the negative log-likelihood of the member; NaN if it could not be computed.
        nll_stderr: the standard error over the rows.
    """

    path: str
    weight: float
    nll: float
    nll_stderr: float


@dataclass(frozen=True)
class ContextBin:
    """NLL and calibration of the rows with similar contexts, see `evaluation.calibration.calibration_by_context`.

    Attributes:
        column: the name of the context column.
        low, high: the smallest and the largest value of a real column in this bin. None for a category.
        category: the category of a categorical column. None for a real column.
        n: the number of rows.
        nll, nll_stderr: the NLL of these rows in nats per sample, and its standard error.
        ks: the largest Kolmogorov-Smirnov distance of the transforms of these rows, see `Calibration`.
        worst: the name of the transform with this distance.
        p_value: the probability of a distance at least as large if the rows are draws from the model, with Bonferroni's
            correction for the number of transforms and the number of bins of all columns.
    """

    column: str
    low: float | None
    high: float | None
    category: str | None
    n: int
    nll: float
    nll_stderr: float
    ks: float
    worst: str
    p_value: float

    @property
    def words(self) -> str:
        """The range or the category, such as "1.2 to 3.4" or "red"."""
        if self.category is not None:
            return self.category
        return f"{self.low:.3g}" if self.low == self.high else f"{self.low:.3g} to {self.high:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the content for JSON, with either `category`, or `low` and `high`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Calibration:
    """A test of whether latents of the data are draws from the base, see `evaluation.calibration.calibration`.

    Attributes:
        n: the number of rows.
        statistic: the largest Kolmogorov-Smirnov distance sup_u |F_n(u) - u| of the probability integral transforms.
        worst: the name of the transform with this distance: "z1" to "zd" or "radius". An ensemble has no latents; its
            only transform is "density".
        p_value: the probability of a distance at least as large if the data are draws from the model, with Bonferroni's
            correction for the number of transforms.
        radius: the distance of the transform "radius". None for an ensemble.
        by_context: the same test for each range and category of the context, in the order of the context columns. ()
            for a flow that is not conditional, and for few rows.
    """

    n: int
    statistic: float
    worst: str
    p_value: float
    radius: float | None
    by_context: tuple[ContextBin, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the content for JSON. Only conditional flows have the key `by_context`."""
        content = {key: value for key, value in asdict(self).items() if key != "by_context"}
        return content | ({"by_context": [one.to_dict() for one in self.by_context]} if self.by_context else {})


@dataclass(frozen=True)
class OODDetection:
    """OOD detection: how well log p separates another set from the evaluated set. NLL is in nats per sample.

    Attributes:
        name: the name of the other set.
        n: the number of its samples.
        infinite: the number of samples in the other set without a finite log p. They count as the least likely.
        nll: the NLL of the samples in the other set with finite log p.
        auroc: the area under the ROC curve with -log p as the OOD score. This is P(log p of a sample of the other set <
            log p of a sample of the evaluated set), where ties count half.
        typicality_auroc: the area with |log p + entropy| as the OOD score (Nalisnick et al. 2019, Detecting
            out-of-distribution inputs to deep generative models using typicality).
        auroc_stderr, typicality_stderr: standard errors by DeLong et al. 1988.
        entropy: the mean NLL of the validation set, an estimate of the model's entropy.
        entropy_of: the rows of this mean: "validation set", or "scored rows" if there is no validation set.
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
    entropy_of: str


@dataclass(frozen=True)
class RankTest:
    """A test of whether ranks of rows among samples of the flow are uniform, see `flowtrain.evaluation.sbc.rank_test`.

    Attributes:
        statistic: the largest distance sup_u |F_n(u) - u| of the ranks, scaled to [0, 1], from uniform ranks.
        p_value: the probability of ranks at least as far from uniform if the rows are draws from the flow.
    """

    statistic: float
    p_value: float

    @property
    def order(self) -> tuple[float, float]:
        """A key that sorts tests from the least to the most uniform, by the p-value and then by the statistic."""
        return self.p_value, -self.statistic


@dataclass(frozen=True)
class Coverage(RankTest):
    """Expected coverage of credible regions, with the test of their ranks.

    Attributes:
        levels: the probabilities of regions under the flow.
        coverage: the share of the rows that are inside of their region, for each level.
    """

    levels: tuple[float, ...]
    coverage: tuple[float, ...]


@dataclass(frozen=True)
class SimulationCalibration:
    """Simulation-based calibration (SBC) and expected coverage, see `flowtrain.evaluation.sbc`.

    Attributes:
        n: the number of rows.
        samples: the number of samples for each row.
        columns: the test of the ranks of each column, by its name. Its p-value is for this column alone.
        tarp: regions around random reference points (TARP).
        density: highest-density regions.
    """

    n: int
    samples: int
    columns: dict[str, RankTest]
    tarp: Coverage
    density: Coverage

    @property
    def worst(self) -> str:
        """The name of the column whose ranks are the least uniform."""
        return min(self.columns, key=lambda name: self.columns[name].order)

    @property
    def p_value(self) -> float:
        """The p-value of all columns together, with Bonferroni's correction."""
        return min(1.0, len(self.columns) * self.columns[self.worst].p_value)


class Ranks(NamedTuple):
    """The ranks of rows among samples of the flow, scaled to [0, 1]: uniform for a perfect flow.

    Attributes:
        columns: by the value of each column, (n, d).
        tarp: by the distance to a reference point, (n,).
        density: by -log p, (n,).
    """

    columns: Tensor
    tarp: Tensor
    density: Tensor


@dataclass(frozen=True)
class AnomalyDetection:
    """Rows that are flagged as anomalies, see `flowtrain.evaluation.anomalies`.

    Attributes:
        n: the number of rows that were tested.
        n_calibration: the number of calibration rows.
        flagged: the number of flagged rows.
        false_positive_rate, false_discovery_rate: the rate that the decisions keep. The other one is None.
        threshold: rows with log p below it are flagged, in nats. None if no row would be flagged.
        explained: the number of flagged rows whose columns were compared.
        n_anomalies, n_ordinary: the numbers of rows that labels call anomalies or not. None without labels, like all
            attributes below.
        auroc, auroc_stderr: the area under the ROC curve of the score -log p, with its standard error.
        average_precision: the average precision of the score.
        measured_false_positive_rate: the share of flagged rows among the ordinary rows.
        measured_true_positive_rate: the share of flagged rows among the anomalies.
        measured_false_discovery_rate: the share of ordinary rows among the flagged rows. None if no row is flagged.
    """

    n: int
    n_calibration: int
    flagged: int
    false_positive_rate: float | None
    false_discovery_rate: float | None
    threshold: float | None
    explained: int
    n_anomalies: int | None = None
    n_ordinary: int | None = None
    auroc: float | None = None
    auroc_stderr: float | None = None
    average_precision: float | None = None
    measured_false_positive_rate: float | None = None
    measured_true_positive_rate: float | None = None
    measured_false_discovery_rate: float | None = None

    @property
    def rate_words(self) -> str:
        """The rate, such as "false positive rate 0.01"."""
        if self.false_discovery_rate is not None:
            return f"false discovery rate {self.false_discovery_rate:g}"
        return f"false positive rate {self.false_positive_rate:g}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the content for JSON, without the attributes that are None, except for the threshold."""
        return {key: value for key, value in asdict(self).items() if value is not None or key == "threshold"}


class AnomalyRows(NamedTuple):
    """The rows of an `AnomalyDetection`. log p is in nats, with -inf for rows that could not be scored.

    Attributes:
        calibration: log p of the calibration rows, (n_calibration,).
        log_p: log p of the rows, (n,).
        p_values: conformal p-values, (n,).
        flagged: whether a row is flagged, (n,).
        columns: the positions of the columns that contribute most, (n, k); -1 for rows that are not explained.
        contributions: their contributions in nats, (n, k); NaN for rows that are not explained.
        labels: 1 for known anomalies, 0 for ordinary rows, NaN for unknown rows, (n,), or None.
    """

    calibration: Tensor
    log_p: Tensor
    p_values: Tensor
    flagged: Tensor
    columns: Tensor
    contributions: Tensor
    labels: Tensor | None


# Attributes for figures that are not in tables or JSON
PRIVATE = (
    "bits_per_nat",
    "scores",
    "sets",
    "pit",
    "member_scores",
    "context_pit",
    "ranks",
    "anomaly_rows",
    "errors",
)
# Largest number of context columns in the table
MOST_CONTEXT_COLUMNS = 3
# Largest number of rows listed in a message
NAMED = 5
# Width of the column of names in tables
NAMES = 13


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `evaluate` and `floweval`. NLL, entropy and KL are in nats per sample.

    `print` shows the table of `floweval`, a notebook shows HTML tables, and `repr` is one line.

    Attributes:
        nll: the mean of -log p(x) over the rows.
        nll_stderr: the standard error over the rows. It includes the noise of estimated traces and of dequantization,
            because each row has independent noise. `error` adds the errors of the solver and of the dtype.
        n: the number of rows.
        n_effective: the effective number of weighted rows, (sum w)^2 / sum w^2 (Kish 1965, Survey sampling). None
            without weights. With weights, all means over rows and their standard errors are weighted, see
            `flowtrain.utils.weighting`.
        split: "val" or "test" for a held-out set of a `Dataset`; "all" for rows of a file or an array.
        step: the training step of the weights.
        bits_per_dim: nll / (D log 2) for integer-valued images, else None.
        entropy: the entropy of the true density. None if it is unknown.
        kl, kl_stderr: the mean of log p_true - log p_model on the same rows, and its standard error. None if the true
            density is unknown.
        trace: "exact" or "hutchinson".
        noise_samples: the number of probes of an estimated trace, else None.
        dequantization_samples: for whole numbers, the number of noise draws for each row, over which p is averaged.
            With 1, the NLL is the bound of uniform dequantization. Else None.
        solver: the settings of the solver. None for a flow that solves no ODE.
        nfe: the number of evaluations of the velocity field in a pass. None for a flow that solves no ODE.
        solver_error: the change of the NLL when the tolerance is tightened tenfold, in float64 on a subset. None for a
            flow that solves no ODE.
        roundtrip_error: max |x - forward(inverse(x))| on the subset, in data units.
        seconds: the time of scoring.
        device, dtype: the device and the dtype of the flow.
        total_seconds: the time of scoring, the error budget and the checks.
        budget: the parts of the error.
        row_error: the errors of single rows. None if the solver has no estimate.
        checks: the checks of the density. `failed` lists the checks that did not pass.
        calibration: the test whether latents of the data are draws from the base.
        ood: the OOD detection. None without another set.
        baselines: likelihoods of simple densities on the same rows, by name. None without `trained_on`, and for images
            and toys.
        members: the members of an ensemble. None for a flow.
        sbc: simulation-based calibration and expected coverage. None if it was not requested.
        spread: the mean over the rows of the weighted standard deviation of log p between the members of an ensemble,
            in nats. Rows are left out if log p of a member is not finite. None if only one member has a weight, and for
            a flow.
        bits_per_nat: the factor from nats to bits/dim for integer-valued images, else None.
        scores: log p(x) of each row in the order of the set, (n,), float64.
        errors: the error of each of `scores`, (n,), see `row_error`. It is NaN if the solver has no estimate.
        sets: log p of this set and of the other set of the OOD detection, (n,) and (m,), or None.
        pit: probability integral transforms of latents by name, (rows,).
        member_scores: log p of each member of an ensemble, (n, M), float64, in the order of `members`. It is NaN if it
            could not be computed. None for a flow.
        ranks: the ranks of the rows in `sbc`. None without `sbc`.
        anomalies: rows that are flagged as anomalies. None if they were not requested.
        anomaly_rows: the rows of `anomalies`. None without `anomalies`.
        context_pit: for each entry of `calibration.by_context`, the name of a transform and its values for these rows,
            (rows,). All bins of a column have the same transform.
    """

    nll: float
    nll_stderr: float
    n: int
    n_effective: float | None
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
    ood: OODDetection | None
    baselines: dict[str, Baseline] | None
    members: tuple[Member, ...] | None
    spread: float | None
    bits_per_nat: float | None
    scores: Tensor
    sets: tuple[Tensor, Tensor] | None
    pit: dict[str, Tensor]
    member_scores: Tensor | None
    context_pit: tuple[tuple[str, Tensor], ...] = ()
    row_error: RowError | None = None
    errors: Tensor | None = None
    sbc: SimulationCalibration | None = None
    ranks: Ranks | None = None
    anomalies: AnomalyDetection | None = None
    anomaly_rows: AnomalyRows | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of eval.json: the numbers above in this order, checks by name, and the headline.

        Arrays are left out. Only ensembles have the keys `members` and `spread`, only weighted rows have `n_effective`,
        and the keys `sbc` and `anomalies` exist only if they were requested.
        """
        content = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in PRIVATE}
        content["calibration"] = self.calibration.to_dict()
        if self.baselines is not None:
            content["baselines"] = {name: found.to_dict() for name, found in self.baselines.items()}
        if self.n_effective is None:
            del content["n_effective"]
        if self.members is None:
            del content["members"], content["spread"]
        else:
            content["members"] = [asdict(member) for member in self.members]
        if self.sbc is None:
            del content["sbc"]
        if self.anomalies is None:
            del content["anomalies"]
        else:
            content["anomalies"] = self.anomalies.to_dict()
        content["checks"] = {c.name: {k: v for k, v in asdict(c).items() if k != "name"} for c in self.checks}
        return {**content, "headline": self.headline}

    @property
    def error(self) -> float:
        """The error of the NLL in nats, from sampling, solver and dtype: `budget.total`."""
        return self.budget.total

    @property
    def kl_error(self) -> float:
        """The error of the KL in nats. The errors of solver and dtype are the same as for the NLL."""
        assert self.kl_stderr is not None
        return math.sqrt(max(0.0, self.budget.total**2 - self.nll_stderr**2) + self.kl_stderr**2)

    @property
    def headline(self) -> str:
        """The NLL with as many digits as its error allows: "NLL 2.402 +- 0.006 nats (solver 3e-6, trace exact)"."""
        return f"NLL {self.amount} ({', '.join(self._remarks())})"

    def in_unit(self, nats: float, error: float) -> str:
        """Formats an amount in nats and its error in the unit of the NLL."""
        name, scale = self.unit
        return f"{with_error(scale * nats, scale * error)} {name}"

    @property
    def amount(self) -> str:
        """The NLL with its error, such as "2.402 +- 0.006 nats"; in bits/dim for images."""
        return self.in_unit(self.nll, self.error)

    @property
    def unit(self) -> tuple[str, float]:
        """(name, factor from nats) of the unit of the NLL: bits/dim for images, else nats."""
        return ("nats", 1.0) if self.bits_per_nat is None else ("bits/dim", self.bits_per_nat)

    @property
    def rows_words(self) -> str:
        """The name of the evaluated rows: "val set" or "test set", or "all rows" for a file or an array."""
        return "all rows" if self.split == "all" else f"{self.split} set"

    @property
    def words(self) -> str:
        """The NLL, and the KL if it is known, for titles of figures."""
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
        """Returns the lines of the table as (name, text), the headline first."""
        rows = [("NLL", self.headline.removeprefix("NLL "))]
        if self.bits_per_nat is not None:
            rows.append(("", f"{with_error(self.nll, self.error)} nats"))
        effective = "" if self.n_effective is None else f", weighted ({self.n_effective:,.4g} effective rows)"
        rows.append(("data", f"{self.rows_words}, {counted(self.n, 'row')}{effective}"))
        if self.kl is not None and self.kl_stderr is not None:
            rows.append(("KL", f"{with_error(self.kl, self.kl_error)} nats  (entropy {self.entropy:.4f})"))
        rows += self._baseline_rows()
        rows += self._member_rows()
        rows.append(("error", self._error_words()))
        if self.row_error is not None:
            name, scale = self.unit
            p99, worst = (brief(scale * v) for v in (self.row_error.p99, self.row_error.worst))
            rows.append(("row error", f"at most {p99} {name} for 99% of the rows, worst {worst}"))
        if (bias := self.budget.bias) is not None:
            name, scale = self.unit
            nll = with_error(scale * bias.nll, scale * bias.stderr)
            words = f"{nll} {name} against an adaptive solve, {brief(scale * bias.per_row)} per row"
            rows.append(("bias", words))
        if self.dequantization_samples is not None:
            gap = self.budget.dequantization_gap
            name, scale = self.unit
            lower = "" if gap is None else f", {brief(scale * gap)} {name} lower with ten times as many"
            draws = counted(self.dequantization_samples, "uniform noise draw")
            rows.append(("dequantized", f"{draws}: a bound{lower}"))
        if self.solver is not None:
            s = self.solver
            how = f"rtol {s['rtol']:g}, atol {s['atol']:g}" if s["rtol"] else f"steps of {s['step_size']:g}"
            noise = "" if self.noise_samples is None else f", {counted(self.noise_samples, 'noise draw')}"
            rows.append(("log-det", f"{self.trace} trace{noise}, {s['method']}, {how}, NFE {self.nfe:.0f}"))
        rows.append(("round trip", f"{self.roundtrip_error:.1e}"))
        rows += [("checks" if i == 0 else "", words) for i, words in enumerate(self._check_words())]
        c = self.calibration
        radius = "" if c.radius is None else f"; radius {c.radius:.3f}"
        words = f"KS {c.statistic:.3f} ({c.worst}), p {p_words(c.p_value)}{radius}"
        rows.append(("latents" if self.members is None else "density rank", words))
        rows += self._context_rows()
        rows += self._sbc_rows()
        rows += self._anomaly_rows()
        if self.ood is not None:
            o = self.ood
            finite = f" over the {o.n - o.infinite:,} rows with a finite log p" if o.infinite else ""
            rows.append(("OOD", f"{o.name}, {counted(o.n, 'row')}: NLL {self.in_unit(o.nll, o.nll_stderr)}{finite}"))
            rows.append(("", f"AUROC of -log p {with_error(o.auroc, o.auroc_stderr)}"))
            typical = with_error(o.typicality_auroc, o.typicality_stderr)
            rows.append(("", f"AUROC of |log p + H| {typical}, H the NLL of the {o.entropy_of}"))
        took = f"scoring {self.seconds:.1f} s, total {self.total_seconds:.1f} s"
        step = f", checkpoint of step {self.step}" if self.members is None else ""
        rows.append(("time", f"{took}, on {self.device} in {self.dtype}{step}"))
        return rows

    def _baseline_rows(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        for name, simple in (self.baselines or {}).items():
            words = name.replace("_", " ") + (f" ({simple.settings})" if simple.settings else "")
            nll = f"{with_error(simple.nll, simple.nll_stderr)} nats"
            rows.append(("" if rows else "baseline", f"{words} {nll}, {_comparison(simple)}"))
        return rows

    def _member_rows(self) -> list[tuple[str, str]]:
        if self.members is None:
            return []
        rows: list[tuple[str, str]] = []
        for member in self.members:
            nll = f"NLL {self.in_unit(member.nll, member.nll_stderr)}" if math.isfinite(member.nll) else "no NLL"
            rows.append(("" if rows else "members", f"weight {member.weight:.3f}, {nll}, {member.path}"))
        if self.spread is not None:
            name, scale = self.unit
            rows.append(("", f"standard deviation of log p between members {brief(scale * self.spread)} {name}"))
        return rows

    def _sbc_rows(self) -> list[tuple[str, str]]:
        if self.sbc is None:
            return []
        s, name = self.sbc, self.sbc.worst
        ranked = f"{counted(s.n, 'row')}, {counted(s.samples, 'sample')} each"
        column = f"column {name} {s.columns[name].statistic:.3f}, p {p_words(s.p_value)}"
        rows = [("SBC", f"{ranked}; ranks of {column}")]
        for what, found in (("TARP", s.tarp), ("density", s.density)):
            shares = ", ".join(f"{a:.0%}: {c:.1%}" for a, c in zip(found.levels, found.coverage, strict=True))
            rows.append(("", f"coverage by {what} {found.statistic:.3f}, p {p_words(found.p_value)} ({shares})"))
        return rows

    def _anomaly_rows(self) -> list[tuple[str, str]]:
        if self.anomalies is None:
            return []
        a, (unit, scale) = self.anomalies, self.unit
        below = "" if a.threshold is None else f", log p below {scale * a.threshold:.4g} {unit}"
        of = f"{counted(a.n_calibration, 'validation row')}"
        rows = [("anomalies", f"{a.flagged:,} of {counted(a.n, 'row')}{below} ({a.rate_words}, {of})")]
        if a.auroc is not None and a.auroc_stderr is not None:
            area = with_error(a.auroc, a.auroc_stderr)
            rows.append(("", f"AUROC {area}, average precision {a.average_precision:.3f}"))
        shares = (
            ("ordinary rows", a.n_ordinary, a.measured_false_positive_rate),
            ("anomalies", a.n_anomalies, a.measured_true_positive_rate),
        )
        measured = [f"{share:.1%} of {n:,} {name}" for name, n, share in shares if n and share is not None]
        return rows + ([("", f"flagged: {', '.join(measured)}")] if measured else [])

    def _context_rows(self) -> list[tuple[str, str]]:
        """Returns a line for each context column, for the columns with the smallest p-values."""
        columns: dict[str, list[ContextBin]] = {}
        for one in self.calibration.by_context:
            columns.setdefault(one.column, []).append(one)
        order = sorted(columns, key=lambda name: min(one.p_value for one in columns[name]))
        rows: list[tuple[str, str]] = []
        for name in order[:MOST_CONTEXT_COLUMNS]:
            best, last = (choose(columns[name], key=lambda one: one.nll) for choose in (min, max))
            worst = min(columns[name], key=lambda one: (one.p_value, -one.ks))
            unit, scale = self.unit
            low, high = (with_error(scale * one.nll, scale * one.nll_stderr) for one in (best, last))
            nll = f"NLL {low} ({best.words}) to {high} {unit} ({last.words})"
            words = f"{name}: {nll}; KS {worst.ks:.3f} ({worst.words}), p {p_words(worst.p_value)}"
            rows.append(("" if rows else "by context", words))
        if len(order) > MOST_CONTEXT_COLUMNS:
            rows.append(("", f"and {counted(len(order) - MOST_CONTEXT_COLUMNS, 'other column')}"))
        return rows

    def _error_words(self) -> str:
        b, (name, scale) = self.budget, self.unit
        parts = [f"sampling {brief(scale * b.sampling)}" if math.isfinite(b.sampling) else "sampling unknown"]
        if self.solver is not None:
            own = "" if b.embedded is None else f" (its own estimate {brief(scale * b.embedded)})"
            parts += [f"trace {brief(scale * b.trace)}", f"solver {brief(scale * b.solver)}{own}"]
        if b.precision is not None:
            parts.append(f"{self.dtype} {brief(scale * b.precision)}")
        return f"{', '.join(parts)} {name}"

    def _check_words(self) -> list[str]:
        good = [f"{c.label} {brief(c.value)}" for c in self.checks if c.passed and c.value is not None]
        lines = [f"passed: {', '.join(good)}"] if good else []
        lines += [f"FAILED: {c.label} {self._failure(c)}" for c in self.failed]
        return lines + [f"not made: {c.label}: {c.message}" for c in self.checks if c.passed is None]

    def _failure(self, check: Check) -> str:
        """Returns the text for a failed check in the table."""
        if isinstance(check, OutlierCheck) and check.nll_without is not None and check.nll_without_stderr is not None:
            rest = self.in_unit(check.nll_without, check.nll_without_stderr)
            lost = (~self.scores.isfinite()).nonzero().flatten().tolist()
            if lost:
                found = f"log p is not finite in {named_rows(lost, len(lost))}"
                if (outliers := check.count - len(lost)) > 0:
                    are = "is an outlier" if outliers == 1 else "are outliers"
                    found += f", and {counted(outliers, 'other row')} {are}"
            else:
                carry = "carries" if check.count == 1 else "carry"
                found = f"{named_rows(check.rows, check.count)} {carry} {check.value:.3g} of the variance of the NLL"
            return f"{found}; NLL of the other {counted(self.n - check.count, 'row')} {rest}"
        return f"{check.value:.2g}, at most {check.limit:.2g}"

    def __repr__(self) -> str:
        passed = sum(check.passed is True for check in self.checks)
        failed = ", ".join(check.label for check in self.failed)
        checks = f"{counted(passed, 'check')} passed" + (f", FAILED: {failed}" if failed else "")
        members = [f"{m.weight:.3g} {m.path} (NLL {m.nll:.4g})" for m in self.members or ()]
        of = f"; members {', '.join(members)}" if members else ""
        return f"<Evaluation: {self.headline}; {self.rows_words}, {counted(self.n, 'row')}; {checks}{of}>"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Returns the tables of the report as HTML, for a notebook."""
        from flowtrain.evaluation.report import as_fragment

        return as_fragment(self)

    def table(self) -> str:
        """Returns the result as text, one line for each quantity."""
        return "\n".join(f"{name:>{NAMES}}  {value}" for name, value in self.rows())


def named_rows(rows: Sequence[int], count: int) -> str:
    """Lists the positions of rows, such as "row 17" or "rows 3, 17 and 19". Rows after the first 5 are only counted.

    Example:
        >>> named_rows([3], 1), named_rows([3, 17, 19], 3), named_rows(range(1000), 1200)
        ('row 3', 'rows 3, 17 and 19', 'rows 0, 1, 2, 3, 4 and 1,195 others')
    """
    named = [str(row) for row in rows[:NAMED]]
    if count > NAMED:
        named.append(f"{count - NAMED:,} others")
    words = named[-1] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"row{'' if count == 1 else 's'} {words}"


def _comparison(simple: Baseline) -> str:
    """Compares the NLL of the flow with a baseline: "the flow is 0.18 +- 0.05 nats lower"."""
    words = with_error(abs(simple.worse), simple.worse_stderr)
    return f"the flow is {words} nats {'higher (worse)' if simple.worse > 0 else 'lower'}"


def p_words(p: float) -> str:
    """Formats a p-value with its relation: "= 0.12" or "< 1e-6"."""
    return "< 1e-6" if p < 1e-6 else f"= {p:.2g}"


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
