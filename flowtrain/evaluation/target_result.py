"""The result of the evaluation of a flow on a target, as a table, as JSON and as one line of text."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from flowtrain.evaluation.log_weights import WeightedSamples
from flowtrain.evaluation.result import NAMES, Check
from flowtrain.utils.formatting import brief, counted, with_error

# attributes for figures that are not in JSON
PRIVATE = ("drawn",)
# keys of the JSON of an `Evaluation` that a target does not have
ABSENT = ("bits_per_dim", "entropy", "noise_samples", "dequantization_samples", "calibration", "ood", "baselines")
# number of modes whose shares the table names
MOST_MODES = 5


@dataclass(frozen=True)
class LogZBudget:
    """The parts of the error of log Z, in nats; see `flowtrain.evaluation.targets`.

    Attributes:
        sampling: the standard error of the mean of the weights, divided by Z.
        tail: the share of Z that the samples lack because none has a weight above the largest one, by the generalized
            Pareto distribution that is fitted to the largest weights.
        solver: the difference to a tight solve in float64 from the same base points, on a subset. With the difference
            m and its standard error s over the subset, this is sqrt(m^2 + s^2). It is 0 for a flow that solves no ODE.
            It is NaN if the tight solve failed.
        precision: the difference between the dtype of the flow and float64, measured like `solver`. None for float64.
        rows: the number of samples of the subset.
        total: the root of the sum of the squares of these parts. This is `log_z_stderr`.
        interval: log Z -+ 1.96 total, a 95% confidence interval. It is not valid if the check `pareto_k` fails.
        elbo_total: the error of the ELBO: its standard error, and the errors of solver and dtype.
    """

    sampling: float
    tail: float
    solver: float
    precision: float | None
    rows: int
    total: float
    interval: tuple[float, float]
    elbo_total: float


@dataclass(frozen=True)
class TargetMember:
    """A member of an ensemble. `nll` is its negative ELBO in nats; see `flowtrain.evaluation.result.Member`."""

    path: str
    weight: float
    nll: float
    nll_stderr: float


@dataclass(frozen=True, eq=False)
class TargetEvaluation:
    """The result of `evaluate_target`, and of `floweval` for a run with a target. Energies and divergences are in nats.

    `print` shows the table of `floweval`, a notebook shows HTML tables, and `repr` is one line. w = p~(x) / q(x) are
    the importance weights of samples x of the flow q for the target p = p~ / Z.

    Attributes:
        nll: the negative evidence lower bound (ELBO), -mean(log w). It is infinite if p~ is 0 at a sample.
        nll_stderr: its standard error over the samples.
        n: the number of samples.
        step: the training step of the weights of the flow.
        log_z: the estimate of log Z, from samples of the flow and samples in its tails.
        log_z_stderr: its error, from sampling, solver and dtype: `budget.total`. `pareto_k` says whether it is valid.
        ess: the effective sample size (sum w)^2 / sum w^2 (Kish 1965) as a share of n, in (0, 1].
        pareto_k: the shape of the tail of the weights (Vehtari et al. 2024). Above 0.7, log Z, its error and the
            effective sample size are not reliable. None for fewer than 25 samples.
        missed_mass: the share of Z that only samples in the tails of the flow show, see
            `flowtrain.evaluation.log_weights.balanced_weights`. None without such samples, as for an ensemble.
        elbo_gap: log_z minus the ELBO, an estimate of KL(q || p).
        forward_ess: 1 / (E_p[w] E_p[1/w]) by exact samples of p (Nicoli et al. 2023). It is small if the flow misses
            a mode. None without exact samples.
        kl_reverse, kl_reverse_stderr: KL(q || p) = log Z - ELBO, and its error. None if log Z is unknown.
        kl_forward, kl_forward_stderr: KL(p || q) by exact samples, and its error. None without exact samples, or if
            log Z is unknown. In JSON, the keys are `kl` and `kl_stderr`.
        log_z_true: log Z as stated by the target, or None.
        mode_shares: the share of samples of the flow nearest to each mode of the target. None if modes are unknown.
        modes_found: the number of modes with enough samples, see `flowtrain.evaluation.targets.modes_of`, or None.
        solver, nfe: settings of the solver, and evaluations of the velocity field in a pass. None without an ODE.
        roundtrip_error: max |x - forward(inverse(x))| on the subset, in data units.
        seconds, total_seconds: the time of drawing and weighting the samples, and of the evaluation.
        device, dtype: the device and the dtype of the flow.
        budget: the parts of the error of log Z.
        checks: the checks of the weights and of the density. `failed` lists the checks that did not pass.
        members: the members of an ensemble. None for a flow.
        drawn: up to 20,000 of the samples, for figures.
    """

    nll: float
    nll_stderr: float
    n: int
    step: int
    log_z: float
    log_z_stderr: float
    ess: float
    pareto_k: float | None
    elbo_gap: float
    missed_mass: float | None
    forward_ess: float | None
    kl_reverse: float | None
    kl_reverse_stderr: float | None
    kl_forward: float | None
    kl_forward_stderr: float | None
    log_z_true: float | None
    mode_shares: tuple[float, ...] | None
    modes_found: int | None
    solver: dict[str, Any] | None
    nfe: float | None
    roundtrip_error: float
    seconds: float
    device: str
    dtype: str
    total_seconds: float
    budget: LogZBudget
    checks: tuple[Check, ...]
    members: tuple[TargetMember, ...] | None
    drawn: WeightedSamples

    @property
    def elbo(self) -> float:
        """The evidence lower bound mean(log w), in nats."""
        return -self.nll

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if check.passed is False]

    @property
    def headline(self) -> str:
        """log Z with its error, and the quality of the weights: "log Z 1.234 +- 0.005 nats (ESS 0.93, k 0.2)"."""
        return f"log Z {with_error(self.log_z, self.log_z_stderr)} nats ({self._quality})"

    @property
    def words(self) -> str:
        """log Z with its error and the quality of the weights, for titles of figures."""
        return f"log Z {with_error(self.log_z, self.log_z_stderr)}, {self._quality}"

    @property
    def _quality(self) -> str:
        k = "unknown" if self.pareto_k is None else f"{self.pareto_k:.1f}"
        return f"ESS {self.ess:.2g}, k {k}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of eval.json. Keys of an `Evaluation` that a target does not have are None.

        Only ensembles have the key `members`.
        """
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in PRIVATE}
        content["kl"], content["kl_stderr"] = content.pop("kl_forward"), content.pop("kl_forward_stderr")
        content["budget"] = asdict(self.budget)
        content["checks"] = {c.name: {k: v for k, v in asdict(c).items() if k != "name"} for c in self.checks}
        if self.members is None:
            del content["members"]
        else:
            content["members"] = [asdict(member) for member in self.members]
        same = {"split": "test", "trace": "exact", "elbo": self.elbo, "modes": content.pop("modes_found")}
        same["solver_error"] = None if self.solver is None else self.budget.solver
        return {**content, **same, **dict.fromkeys(ABSENT), "headline": self.headline}

    def rows(self) -> list[tuple[str, str]]:
        """Returns the lines of the table as (name, text), the headline first."""
        rows = [("log Z", self.headline.removeprefix("log Z "))]
        if self.log_z_true is not None:
            apart = abs(self.log_z - self.log_z_true)
            rows.append(("", f"the target states {self.log_z_true:.6g}: {brief(apart)} nats apart"))
        gap = f", {brief(self.elbo_gap)} below log Z"
        rows.append(("ELBO", f"{with_error(self.elbo, self.budget.elbo_total)} nats{gap}"))
        words = f"{counted(self.n, 'sample')} of the flow"
        if self.missed_mass is not None:
            words += f"; samples in its tails add {max(0.0, self.missed_mass):.1%} to Z"
        rows.append(("data", words))
        rows += self._divergence_rows()
        rows += self._mode_rows()
        rows += self._member_rows()
        rows.append(("error", self._error_words()))
        if self.solver is not None:
            s = self.solver
            how = f"rtol {s['rtol']:g}, atol {s['atol']:g}" if s["rtol"] else f"steps of {s['step_size']:g}"
            rows.append(("log-det", f"exact trace, {s['method']}, {how}, NFE {self.nfe:.0f}"))
        rows.append(("round trip", f"{self.roundtrip_error:.1e}"))
        rows += [("checks" if i == 0 else "", words) for i, words in enumerate(self._check_words())]
        took = f"sampling {self.seconds:.1f} s, total {self.total_seconds:.1f} s"
        step = f", checkpoint of step {self.step}" if self.members is None else ""
        rows.append(("time", f"{took}, on {self.device} in {self.dtype}{step}"))
        return rows

    def _divergence_rows(self) -> list[tuple[str, str]]:
        rows = []
        for name, value, error in (
            ("KL(q || p)", self.kl_reverse, self.kl_reverse_stderr),
            ("KL(p || q)", self.kl_forward, self.kl_forward_stderr),
        ):
            if value is not None and error is not None:
                rows.append((name, f"{with_error(value, error)} nats"))
        if self.forward_ess is not None:
            rows.append(("forward ESS", f"{self.forward_ess:.2g}, by exact samples"))
        return rows

    def _mode_rows(self) -> list[tuple[str, str]]:
        if self.mode_shares is None:
            return []
        shares = sorted(self.mode_shares)
        words = f"{self.modes_found} of {len(shares)} found"
        if len(shares) <= MOST_MODES:
            each = ", ".join(f"{share:.1%}" for share in self.mode_shares)
            return [("modes", f"{words}; shares of samples {each}")]
        return [("modes", f"{words}; share of samples {shares[0]:.1%} to {shares[-1]:.1%}")]

    def _member_rows(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        for member in self.members or ():
            elbo = f"ELBO {with_error(-member.nll, member.nll_stderr)} nats"
            rows.append(("" if rows else "members", f"weight {member.weight:.3f}, {elbo}, {member.path}"))
        return rows

    def _error_words(self) -> str:
        b = self.budget
        parts = [f"sampling {brief(b.sampling)}", f"tail {brief(b.tail)}"]
        if self.solver is not None:
            parts.append(f"solver {brief(b.solver)}")
        if b.precision is not None:
            parts.append(f"{self.dtype} {brief(b.precision)}")
        return f"{', '.join(parts)} nats"

    def _check_words(self) -> list[str]:
        good = [f"{c.label} {brief(c.value)}" for c in self.checks if c.passed and c.value is not None]
        lines = [f"passed: {', '.join(good)}"] if good else []
        lines += [f"FAILED: {c.label} {c.value:.2g}, at most {c.limit:.2g}" for c in self.failed]
        return lines + [f"not made: {c.label}: {c.message}" for c in self.checks if c.passed is None]

    def __repr__(self) -> str:
        passed = sum(check.passed is True for check in self.checks)
        failed = ", ".join(check.label for check in self.failed)
        checks = f"{counted(passed, 'check')} passed" + (f", FAILED: {failed}" if failed else "")
        return f"<TargetEvaluation: {self.headline}; {counted(self.n, 'sample')}; {checks}>"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Returns the tables of the report as HTML, for a notebook."""
        from flowtrain.evaluation.report import as_fragment

        return as_fragment(self)

    def table(self) -> str:
        """Returns the result as text, one line for each quantity."""
        return "\n".join(f"{name:>{NAMES}}  {value}" for name, value in self.rows())
