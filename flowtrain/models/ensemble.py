"""Ensembles of flows: log p(x) = log sum_m w_m p_m(x), and their weights by EM on held-out rows (stacking)."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor, nn

from flowtrain.flow import Density, Flow, Label
from flowtrain.ode import Solver
from flowtrain.utils.errors import FlowtrainError, NonFiniteError
from flowtrain.utils.formatting import as_ranges

# EM stops when the mean log-likelihood is at most so many nats below its maximum, or after so many iterations
GAP, ITERATIONS = 1e-6, 10_000
# a member is left out if the mean log-likelihood of the held-out rows loses at most so many nats without it
LOSS = 1e-6
# the same, for each member that `sparse_weights` leaves out
SPARSE_LOSS = 0.002


class Ensemble(Density):
    """A weighted mixture of flows: log p(x) = log sum_m w_m p_m(x), in nats.

    The weights of conditional members do not depend on the label: p(x | y) = sum_m w_m p_m(x | y).

    It is an exact density, and it is sampled by drawing a member for each sample (Smyth and Wolpert 1999, Linearly
    combining density estimators via stacking). `stacking_weights` gives the weights with the highest likelihood of
    held-out rows.

    An ensemble scores and samples as a `Flow` does. It has no latents: `forward` and `inverse` raise FlowtrainError.
    A member whose log p is NaN at a row counts as zero density there, which makes log p(x) a lower bound; it is NaN
    where all members are NaN. If the trace of a member is estimated, see `Flow`, the logarithm of the sum is biased
    upwards by the noise. `flowtrain.evaluate` uses a lower bound in its place.

    Args:
        members: flows over the same kind of samples. Members of weight 0 are kept, but not computed.
        weights: one for each member, not negative; they are divided by their sum. None: equal weights.
        names: names of the members in tables, such as the paths of their files. None: their positions.

    Attributes:
        members: all flows, including flows with weight 0.
        weights: the weight of each member; they sum to 1.
        names: the name of each member.
        flows: the members whose weight is not 0.

    Raises:
        FlowtrainError: no members, members that are not flows or are of different kinds, or weights that are not
            weights.

    Example:
        >>> from flowtrain.bijections.linear import Affine
        >>> narrow, wide = Flow((1,), Affine(1)), Flow((1,), Affine(1))
        >>> _ = torch.nn.init.constant_(wide.bijection.mean, 3.0)
        >>> ensemble = Ensemble([narrow, wide], [0.25, 0.75])
        >>> round(ensemble.log_prob(torch.tensor([[3.0]])).item(), 4)  # log(0.75 / sqrt(2 pi) + 0.25 exp(-9 / 2) / ...)
        -1.2029
        >>> ensemble.sample(5).shape
        torch.Size([5, 1])
    """

    def __init__(
        self, members: Sequence[Flow], weights: Sequence[float] | None = None, names: Sequence[str] | None = None
    ) -> None:
        members = list(members)
        _check_members(members)
        weights = [1.0] * len(members) if weights is None else list(weights)
        names = list(map(str, range(len(members)) if names is None else names))
        numbers = all(isinstance(w, int | float) and 0 <= w < math.inf for w in weights)
        if not numbers or len(weights) != len(members) or sum(weights) <= 0:
            raise FlowtrainError(
                f"weights={weights}: give one number for each of the {len(members)} members, not negative and not all 0"
            )
        if len(names) != len(members):
            raise FlowtrainError(f"names={names}: give one name for each of the {len(members)} members")
        one = members[0]
        super().__init__(
            one.event_shape, one.classes, one.integer_valued, one.levels, one.centered, one.noisy, one.class_counts
        )
        self.members = nn.ModuleList(members)
        self.weights = tuple(w / sum(weights) for w in weights)
        self.names = tuple(names)

    @property
    def flows(self) -> tuple[Flow, ...]:
        return tuple(cast(Flow, m) for m, w in zip(self.members, self.weights, strict=True) if w > 0)

    @property
    def active_names(self) -> tuple[str, ...]:
        """The names of `flows`."""
        return tuple(name for name, w in zip(self.names, self.weights, strict=True) if w > 0)

    @property
    def log_weights(self) -> tuple[float, ...]:
        return tuple(math.log(w) for w in self.weights if w > 0)

    def _log_prob(self, x: Tensor, label: Label) -> Tensor:
        # all members score the same points
        x = self.dequantized(self._checked(x, "x"))
        return self.combined(torch.stack([flow.log_prob(x, label) for flow in self.flows]))

    def _drawn(
        self, n: int, temperature: float, chunk: int | None, labels: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        weights = torch.tensor([w for w in self.weights if w > 0], dtype=torch.float64, device=self.like.device)
        member = torch.multinomial(weights, n, replacement=True, generator=generator)
        found, places = [], []
        for i, flow in enumerate(self.flows):
            rows = (member == i).nonzero().flatten()
            if len(rows):
                y = None if labels is None else labels[rows]
                found.append(flow._drawn(len(rows), temperature, chunk, y, generator))
                places.append(rows)
        return torch.cat(found)[torch.cat(places).argsort()]

    def forward(self, *arguments: Any, **named: Any) -> NoReturn:
        """An ensemble has none.

        Raises:
            FlowtrainError: always.
        """
        raise FlowtrainError("forward: an ensemble is no map from base to data; take that of one of its members")

    def inverse(self, *arguments: Any, **named: Any) -> NoReturn:
        """An ensemble has none.

        Raises:
            FlowtrainError: always.
        """
        raise FlowtrainError("inverse: an ensemble has no latents; take those of one of its members")

    def with_solvers(self, change: Callable[[Solver], Solver]) -> Self:
        return self._with_members([m.with_solvers(change) for m in self._all])

    def with_kind(self, **data: Any) -> Self:
        found = self._with_members([m.with_kind(**data) for m in self._all])
        found.__dict__.update(data)
        found.record = None
        return found

    @property
    def _all(self) -> list[Flow]:
        return [cast(Flow, m) for m in self.members]

    def _with_members(self, members: list[Flow]) -> Self:
        found = copy(self)
        found._modules = {**self._modules, "members": nn.ModuleList(members)}
        return found

    def __repr__(self) -> str:
        members = ", ".join(f"{w:.3g} {name}" for name, w in zip(self.names, self.weights, strict=True))
        return f"<Ensemble of {len(self.names)} flows over samples of shape {self.event_shape}: {members}>"


def _check_members(members: Sequence[Any]) -> None:
    if not members:
        raise FlowtrainError("an ensemble needs at least one member")
    for i, member in enumerate(members):
        if not isinstance(member, Flow):
            what = "an ensemble: give its members" if isinstance(member, Ensemble) else f"a {type(member).__name__}"
            raise FlowtrainError(f"members[{i}] is {what}; an ensemble is made of flows")
        if difference := difference_in_kind(members[0], member):
            raise FlowtrainError(
                f"members[0] and members[{i}] differ in {difference}; an ensemble is over one kind of sample"
            )


def difference_in_kind(one: Density, other: Density) -> str | None:
    """The difference between the kinds of samples, such as "classes (None and 3)"; None if they agree."""
    names = ("event_shape", "classes", "integer_valued", "levels", "noisy", "centered")
    for name in names:
        a, b = (tuple(v) if isinstance(v := getattr(flow, name), list) else v for flow in (one, other))
        if a != b:
            return f"{name} ({a} and {b})"
    return None


@torch.no_grad()
def stacking_weights(log_p: Tensor) -> list[float]:
    """The weights w on the simplex that maximise mean_i log sum_m w_m p_m(x_i), by EM; (M,).

    The objective is concave. An iteration is w_m <- w_m g_m with g_m = mean_i p_m(x_i) / sum_k w_k p_k(x_i), and the
    maximum is at most max_m g_m - 1 nats above the present value: EM stops when that is below 1e-6 nats, or after
    10,000 iterations. Then members without which the mean loses at most 1e-6 nats get the weight 0, the smallest first.

    Args:
        log_p: log p_m(x_i) in nats, (n, M), of rows that no member was trained on. A value that is not finite counts
            as zero density.

    Raises:
        NonFiniteError: rows at which no member has a finite log p, or no rows.

    Example:
        >>> log_p = torch.tensor([[0.5, 0.1], [0.5, 0.1], [0.1, 0.5]]).log()
        >>> [round(w, 3) for w in stacking_weights(log_p)]  # the maximum of (0.1 + 0.4 w)^2 (0.5 - 0.4 w)
        [0.75, 0.25]
    """
    log_p = log_p.double()
    log_p = torch.where(log_p.isfinite(), log_p, -torch.inf)
    best = log_p.amax(1, keepdim=True)
    lost = (~best.isfinite()).flatten().nonzero().flatten()
    if len(lost) or not len(log_p):
        which = f"rows {as_ranges(lost[:1000].tolist())}" if len(lost) else "no rows: there are none"
        raise NonFiniteError(
            f"the weights of the members cannot be found: no member has a finite log p at {which} of the validation "
            "set. Leave these rows out, or give the weights (weights=equal)"
        )
    p = (log_p - best).exp()
    w = p.new_full((p.shape[1],), 1 / p.shape[1])
    for _ in range(ITERATIONS):
        gain = (p / (p @ w).unsqueeze(1)).mean(0)
        w = w * gain
        w = w / w.sum()
        if float(gain.max()) - 1 < GAP:
            break
    for m in w.argsort().tolist():
        rest = w.clone()
        rest[m] = 0
        if float(rest.sum()) > 0:
            rest = rest / rest.sum()
            loss = ((p @ w).log() - (p @ rest).log()).mean()
            w = rest if float(loss) <= LOSS else w
    return [float(each) for each in w]


def sparse_weights(log_p: Tensor) -> list[float]:
    """Stacking weights of as few members as possible; see `stacking_weights`.

    Members are left out one by one, while the mean of log p falls by at most SPARSE_LOSS nats for each.

    Args:
        log_p: log p of the validation rows by each member, (n, M), in nats.

    Raises:
        NonFiniteError: as `stacking_weights`.
    """
    log_p = torch.where(log_p.isfinite(), log_p, -math.inf)

    def fitted(kept: Sequence[int]) -> tuple[float, list[float]]:
        weights = [0.0] * log_p.shape[1]
        for m, weight in zip(kept, stacking_weights(log_p[:, kept]), strict=True):
            weights[m] = weight
        return -float(stacked(log_p, weights).mean()), weights

    nll, weights = fitted(range(log_p.shape[1]))
    while True:
        kept = [m for m, weight in enumerate(weights) if weight > 0]
        fewer = [[m for m in kept if m != out] for out in kept if _covers(log_p[:, [m for m in kept if m != out]])]
        tried = [fitted(rest) for rest in fewer if rest]
        best = min(tried, key=lambda found: found[0], default=(math.inf, weights))
        if best[0] - nll > SPARSE_LOSS:
            return weights
        nll, weights = best


def stacked(log_p: Tensor, weights: Sequence[float]) -> Tensor:
    """log sum_m w_m p_m at each row, (n,), in nats, from log p_m (n, M); NaN counts as zero density."""
    log_w = log_p.new_tensor(weights).log()
    return (torch.where(log_p.isnan(), -math.inf, log_p) + log_w).logsumexp(1)


def _covers(log_p: Tensor) -> bool:
    """Whether at each row some member has a positive density."""
    return log_p.shape[1] > 0 and bool(log_p.isfinite().any(1).all())
