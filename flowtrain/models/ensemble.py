"""Ensembles of flows: log p(x) = log sum_m w_m p_m(x), and their weights by EM on held-out rows (stacking)."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor, nn

from flowtrain.data.types import ColumnType
from flowtrain.flow import Context, Density, Flow
from flowtrain.ode import Solver
from flowtrain.utils.errors import DataError, FlowtrainError, NonFiniteError
from flowtrain.utils.formatting import as_ranges
from flowtrain.utils.weighting import average

# EM stops if the mean log-likelihood is at most GAP nats below its maximum, or after this number of iterations
GAP, ITERATIONS = 1e-6, 10_000
# a member is removed if the mean log-likelihood of the held-out rows then falls by at most LOSS nats
LOSS = 1e-6
# the same limit for `sparse_weights`
SPARSE_LOSS = 0.002


class Ensemble(Density):
    """A weighted mixture of flows: log p(x) = log sum_m w_m p_m(x), in nats.

    If the members are conditional, the weights do not depend on the context: p(x | c) = sum_m w_m p_m(x | c).

    The mixture is an exact density. To sample, a member is drawn for each sample (Smyth and Wolpert 1999, Linearly
    combining density estimators via stacking). `stacking_weights` computes the weights with the highest likelihood of
    held-out rows.

    `log_prob` and `sample` work as in `Flow`. An ensemble has no latents: `forward` and `inverse` raise FlowtrainError.
    If log p of some members is NaN at x, these members count as zero density there, and log p(x) is a lower bound. If
    log p of all members is NaN, log p(x) is NaN. If the trace of a member is estimated, see `Flow`, the noise biases
    log p(x) upwards. `flowtrain.evaluate` then uses a lower bound.

    Args:
        members: flows of the same kind of samples. Members with weight 0 are kept, but not evaluated.
        weights: a weight of at least 0 for each member. They are divided by their sum. None: equal weights.
        names: names of the members in tables, such as the paths of their files. None: their indices.

    Attributes:
        members: all flows, including flows with weight 0.
        weights: the weight of each member. They sum to 1.
        names: the name of each member.
        flows: the members with a nonzero weight.

    Raises:
        FlowtrainError: no members, members that are not flows or have different kinds of samples, or invalid weights.

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
            one.event_shape,
            one.classes,
            one.integer_valued,
            one.levels,
            one.centered,
            one.noisy,
            one.class_counts,
            one.context,
            one.types,
        )
        self.context_rows = one.context_rows
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

    def _log_prob(self, x: Tensor, context: Context) -> Tensor:
        # x is dequantized once, so that all members evaluate the same points
        x = self.dequantized(self._checked(x, "x"))
        return self.combined(torch.stack([flow.log_prob(x, context) for flow in self.flows]))

    def _log_prob_with_error(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        x = self.dequantized(self._checked(x, "x"))
        log_p, errors = map(
            torch.stack, zip(*(flow.log_prob(x, context, with_error=True) for flow in self.flows), strict=True)
        )
        return self.combined(log_p), self.combined_error(log_p, errors)

    def _drawn(
        self, n: int, temperature: float, chunk: int | None, context: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        weights = torch.tensor([w for w in self.weights if w > 0], dtype=torch.float64, device=self.like.device)
        member = torch.multinomial(weights, n, replacement=True, generator=generator)
        found, places = [], []
        for i, flow in enumerate(self.flows):
            rows = (member == i).nonzero().flatten()
            if len(rows):
                c = None if context is None else context[rows]
                found.append(flow._drawn(len(rows), temperature, chunk, c, generator))
                places.append(rows)
        return torch.cat(found)[torch.cat(places).argsort()]

    def forward(self, *arguments: Any, **named: Any) -> NoReturn:
        """Raises an error, because an ensemble has no map from base to data.

        Raises:
            FlowtrainError: always.
        """
        raise FlowtrainError("forward: an ensemble has no map from base to data; call forward of one of its members")

    def inverse(self, *arguments: Any, **named: Any) -> NoReturn:
        """Raises an error, because an ensemble has no latents.

        Raises:
            FlowtrainError: always.
        """
        raise FlowtrainError("inverse: an ensemble has no latents; call inverse of one of its members")

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
        return f"<Ensemble of {len(self.names)} flows of samples of shape {self.event_shape}: {members}>"


def _check_members(members: Sequence[Any]) -> None:
    if not members:
        raise FlowtrainError("an ensemble needs at least one member")
    for i, member in enumerate(members):
        if not isinstance(member, Flow):
            what = "an ensemble: give its members" if isinstance(member, Ensemble) else f"a {type(member).__name__}"
            raise FlowtrainError(f"members[{i}] is {what}; the members of an ensemble must be flows")
        if difference := difference_in_kind(members[0], member):
            raise FlowtrainError(
                f"members[0] and members[{i}] differ in {difference}; all members of an ensemble need the same kind of "
                "samples"
            )


def difference_in_kind(one: Density, other: Density) -> str | None:
    """Returns the first difference between the kinds of samples, such as "classes (None and 3)", or None."""
    names = ("event_shape", "classes", "integer_valued", "levels", "noisy", "types", "centered")
    for name in names:
        a, b = (tuple(v) if isinstance(v := getattr(flow, name), list) else v for flow in (one, other))
        if name == "types":
            # the scale is a part of the map of each member
            a, b = (tuple(replace(each, scale=0.0) for each in types) for types in (a, b))
            if a != b:
                return f"types ({_types_text(a, b)} and {_types_text(b, a)})"
        if a != b:
            return f"{name} ({a} and {b})"
    # each member standardises the context itself
    a, b = ([replace(column, mean=0.0, std=1.0) for column in flow.context] for flow in (one, other))
    return None if a == b else f"context ({a} and {b})"


def _types_text(types: Sequence[ColumnType], others: Sequence[ColumnType]) -> str:
    """Returns the types of the columns, with the categories if the types of the other member have the same text."""
    texts = [str(one) for one in types]
    if texts == [str(one) for one in others]:
        texts = [f"{one}{one.categories}" if one.categories else str(one) for one in types]
    return ", ".join(texts) or "none"


@torch.no_grad()
def stacking_weights(log_p: Tensor, of_rows: Tensor | None = None) -> list[float]:
    """Computes the weights w (M,) on the simplex that maximise mean_i log sum_m w_m p_m(x_i), by EM.

    The objective is concave. An iteration is w_m <- w_m g_m with g_m = mean_i p_m(x_i) / sum_k w_k p_k(x_i). The
    maximum is at most max_m g_m - 1 nats above the present value. EM stops if this is below 1e-6 nats, or after 10,000
    iterations. Then each member, beginning with the smallest weight, gets the weight 0 if this lowers the mean by at
    most 1e-6 nats.

    Args:
        log_p: log p_m(x_i) in nats, (n, M), for rows that no member was trained on. A value that is not finite counts
            as zero density.
        of_rows: the weights of the rows, (n,), with which the means are weighted, or None.

    Raises:
        NonFiniteError: there are no rows, or a row at which no member has a finite log p.
        DataError: weights of rows that are negative, for which EM does not converge.

    Example:
        >>> log_p = torch.tensor([[0.5, 0.1], [0.5, 0.1], [0.1, 0.5]]).log()
        >>> [round(w, 3) for w in stacking_weights(log_p)]  # the maximum of (0.1 + 0.4 w)^2 (0.5 - 0.4 w)
        [0.75, 0.25]
    """
    log_p = log_p.double()
    if of_rows is not None:
        if bool((of_rows < 0).any()):
            raise DataError(
                "the weights of the members cannot be computed, because some validation rows have negative weights "
                "(data.signed_weights); give the weights of the members, or weights=equal"
            )
        log_p, of_rows = log_p[of_rows != 0], of_rows[of_rows != 0]
    log_p = torch.where(log_p.isfinite(), log_p, -torch.inf)
    best = log_p.amax(1, keepdim=True)
    lost = (~best.isfinite()).flatten().nonzero().flatten()
    if len(lost) or not len(log_p):
        which = (
            f"no member has a finite log p at rows {as_ranges(lost[:1000].tolist())} of the validation set"
            if len(lost)
            else "the validation set has no rows"
        )
        raise NonFiniteError(
            f"the weights of the members cannot be computed: {which}. Use other validation rows, or give the weights "
            "(weights=equal)"
        )
    p = (log_p - best).exp()
    share = p.new_full((len(p),), 1 / len(p)) if of_rows is None else (of_rows / of_rows.sum()).to(p)
    w = p.new_full((p.shape[1],), 1 / p.shape[1])
    for _ in range(ITERATIONS):
        gain = share @ (p / (p @ w).unsqueeze(1))
        w = w * gain
        w = w / w.sum()
        if float(gain.max()) - 1 < GAP:
            break
    for m in w.argsort().tolist():
        rest = w.clone()
        rest[m] = 0
        if float(rest.sum()) > 0:
            rest = rest / rest.sum()
            loss = share @ ((p @ w).log() - (p @ rest).log())
            w = rest if float(loss) <= LOSS else w
    return [float(each) for each in w]


def sparse_weights(log_p: Tensor, of_rows: Tensor | None = None) -> list[float]:
    """Computes stacking weights with few nonzero members; see `stacking_weights`.

    Members are removed one by one, as long as each removal lowers the mean log p by at most SPARSE_LOSS nats.

    Args:
        log_p: log p of the validation rows by each member, (n, M), in nats.
        of_rows: the weights of the rows, (n,), or None.

    Raises:
        NonFiniteError, DataError: as in `stacking_weights`.
    """
    if of_rows is not None:
        log_p, of_rows = log_p[of_rows != 0], of_rows[of_rows != 0]
    log_p = torch.where(log_p.isfinite(), log_p, -math.inf)

    def fitted(kept: Sequence[int]) -> tuple[float, list[float]]:
        weights = [0.0] * log_p.shape[1]
        for m, weight in zip(kept, stacking_weights(log_p[:, kept], of_rows), strict=True):
            weights[m] = weight
        return -float(average(stacked(log_p, weights), of_rows)), weights

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
    """Returns log sum_m w_m p_m for each row, (n,), in nats, from log p_m (n, M). NaN counts as zero density."""
    log_w = log_p.new_tensor(weights).log()
    return (torch.where(log_p.isnan(), -math.inf, log_p) + log_w).logsumexp(1)


def _covers(log_p: Tensor) -> bool:
    """Whether every row has a positive density under at least one member."""
    return log_p.shape[1] > 0 and bool(log_p.isfinite().any(1).all())
