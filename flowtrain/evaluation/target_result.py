"""The result of the evaluation of a flow on a target, and its text, table and JSON."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from flowtrain.evaluation.log_weights import WeightedSamples
from flowtrain.evaluation.result import NAMES, Check
from flowtrain.utils.formatting import brief, counted, with_error

# attributes that only figures use, and that JSON does not contain
PRIVATE = ("drawn",)
# keys of the JSON of an `Evaluation` that do not apply to a target
ABSENT = ("bits_per_dim", "entropy", "noise_samples", "dequantization_samples", "calibration", "ood", "baselines")
# largest number of modes whose shares the table lists
MOST_MODES = 5


@dataclass(frozen=True)
class LogZBudget:
    """The parts of the error of log Z, in nats; see `flowtrain.evaluation.targets.evaluate_target`.

    Attributes:
        sampling: the standard error of the mean of the weights, divided by Z.
        tail: the share of Z from weights above the largest sampled weight, by the generalized Pareto distribution that
            is fitted to the largest weights.
        solver: the change of log Z by a tight solve in float64, from the same base points of a subset. With the change
            m and its standard error s, it is sqrt(m^2 + s^2). It is 0 without an ODE, and NaN if the tight solve
            failed.
        precision: the change of log Z from the dtype of the flow to float64, measured like `solver`. None for float64.
        rows: the number of samples of the subset.
        total: the root of the sum of the squares of these parts, without parts that are NaN. It is `log_z_stderr`.
        interval: log Z -+ 1.96 total, a 95% confidence interval. It is not reliable if the check `pareto_k` fails.
        elbo_total: the error of the ELBO, from sampling, solver and precision.
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
    """A member of an ensemble. `nll` is the negative ELBO in nats, and `nll_stderr` its standard error."""

    path: str
    weight: float
    nll: float
    nll_stderr: float


@dataclass(frozen=True, eq=False)
class TargetEvaluation:
    """The result of `evaluate_target`, and of `floweval` for a run on a target.

    `print` shows the table of `floweval`, a notebook shows HTML tables, and `repr` is one line. A sample x of the flow
    q has the importance weight w = p~(x) / q(x) for the target p = p~ / Z. log Z, ELBO and divergences are in nats.

    Attributes:
        nll: the negative evidence lower bound (ELBO), -mean(log w). It is infinite if p~ is 0 at a sample.
        nll_stderr: the standard error of `nll` over the samples.
        n: the number of samples.
        step: the training step of the weights of the flow.
        log_z: the estimate of log Z, from samples of the flow and samples in the tails of the flow.
        log_z_stderr: the error of `log_z`, equal to `budget.total`.
        ess: the effective sample size (sum w)^2 / sum w^2 (Kish 1965), as a share of n in (0, 1].
        pareto_k: the shape of the tail of the weights (Vehtari et al. 2024). Above 0.7, `log_z`, `log_z_stderr` and
            `ess` are not reliable. None for fewer than 25 samples.
        missed_mass: the share of Z that samples in the tails of the flow add, see
            `flowtrain.evaluation.log_weights.balanced_weights`. None without such samples, as for an ensemble.
        elbo_gap: `log_z` minus the ELBO, an estimate of KL(q || p).
        forward_ess: 1 / (E_p[w] E_p[1/w]) over exact samples of p (Nicoli et al. 2023). It is small if the flow misses
            a mode. None without exact samples.
        kl_reverse, kl_reverse_stderr: KL(q || p) = log Z - ELBO with the known log Z, and the error of KL(q || p). None
            if log Z is unknown.
        kl_forward, kl_forward_stderr: KL(p || q) over exact samples with the known log Z, and the error of KL(p || q).
            None without exact samples, or if log Z is unknown. In JSON, the keys are `kl` and `kl_stderr`.
        log_z_true: the known log Z, `Target.log_z`, or None.
        mode_shares: the share of the samples of the flow at each mode of the target. A sample belongs to the nearest
            mode. None if the modes are unknown.
        modes_found: the number of modes whose share of the samples is at least a quarter of their share of the mass.
            None if the modes are unknown. In JSON, the key is `modes`.
        solver, nfe: the settings of the solver, and the number of evaluations of the velocity field in a pass. None
            without an ODE.
        roundtrip_error: max |x - forward(inverse(x))| on the subset, in data units.
        seconds, total_seconds: the time of drawing and weighting the samples of the flow, and of the whole evaluation.
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
        """log Z with its error, ESS and Pareto k: "log Z 1.234 +- 0.005 nats (ESS 0.93, k 0.2)"."""
        return f"log Z {with_error(self.log_z, self.log_z_stderr)} nats ({self._quality})"

    @property
    def words(self) -> str:
        """log Z with its error, ESS and Pareto k, for titles of figures."""
        return f"log Z {with_error(self.log_z, self.log_z_stderr)}, {self._quality}"

    @property
    def _quality(self) -> str:
        k = "unknown" if self.pareto_k is None else f"{self.pareto_k:.1f}"
        return f"ESS {self.ess:.2g}, k {k}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of eval.json. Keys of an `Evaluation` that do not apply to a target are None.

        Only an ensemble has the key `members`.
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
            rows.append(("", f"known value {self.log_z_true:.6g}, difference {brief(apart)} nats"))
        gap = f", {brief(self.elbo_gap)} below log Z"
        rows.append(("ELBO", f"{with_error(self.elbo, self.budget.elbo_total)} nats{gap}"))
        words = f"{counted(self.n, 'sample')} of the flow"
        if self.missed_mass is not None:
            words += f"; samples in the tails add {max(0.0, self.missed_mass):.1%} to Z"
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
            rows.append(("forward ESS", f"{self.forward_ess:.2g}, over exact samples"))
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
        """Returns the table of `rows` as text."""
        return "\n".join(f"{name:>{NAMES}}  {value}" for name, value in self.rows())
