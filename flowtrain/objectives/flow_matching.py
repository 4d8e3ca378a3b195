"""The objectives flow matching, rectified flow, and flow matching followed by maximum likelihood."""

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowtrain.bijections.decomposition import stages
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.flow import Flow, rows_at_a_time
from flowtrain.objectives.base import Objective, weighted_mean
from flowtrain.objectives.likelihood import Likelihood
from flowtrain.ode import AS_CONFIGURED, SolveOptions
from flowtrain.utils.arguments import number, one_of, whole
from flowtrain.utils.circle import wrap
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.process import seeded

log = logging.getLogger("flowtrain")


# the arguments are z, x, the features of the context and the indices of the circular columns. The result is z in the
# order of its partners x
Coupling = Callable[[Tensor, Tensor, Tensor | None, Sequence[int]], Tensor]
# optimal coupling exchanges points only between contexts whose features have at most this distance. Real features have
# a standard deviation of 1
CONTEXT_RADIUS = 0.1


def independent(z: Tensor, x: Tensor, context: Tensor | None = None, circular: Sequence[int] = ()) -> Tensor:
    """Returns z (B, *event) unchanged, so base points and samples are paired at random."""
    return z


def optimal(z: Tensor, x: Tensor, context: Tensor | None = None, circular: Sequence[int] = ()) -> Tensor:
    """Reorders z to minimize sum_i |z_i - x_i|^2 over the allowed pairings of the batch, exactly.

    Differences of circular columns are wrapped to [-pi, pi).

    This is minibatch optimal transport (Pooladian et al. 2023, Multisample flow matching, eq. 9; Tong et al. 2024,
    Improving and generalizing flow-based generative models with minibatch optimal transport, section 3.2). The pairing
    is computed on the CPU in a time of order B^3.

    With features h (B, F) of a context, z_i may replace z_j only if |h_i - h_j| <= CONTEXT_RADIUS. The points z and the
    context are independent, and such a pairing keeps them nearly independent. With a pairing over all rows, the points
    z for a given context would follow another distribution than the base (Cheng and Schwing 2025, The curse of
    conditions: Analyzing and improving optimal transport for conditional flow-based generation, section 3).

    Shapes: z, x and the result are (B, *event).

    Raises:
        ConfigError: scipy is not installed.

    Example:
        >>> optimal(torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0]]))
        tensor([[5.],
                [0.]])
    """
    # the sums of |z|^2 and |x|^2 are the same for every pairing
    cost = -(x.flatten(1) @ z.flatten(1).T)
    for i in circular:
        at_x, at_z = x[:, i, None], z[:, i]
        # in place of -x z, half the squared wrapped difference
        cost += at_x * at_z + 0.5 * wrap(at_x - at_z).square()
    if context is not None:
        # every z may keep its place, so an allowed pairing exists
        forbidden = torch.cdist(context, context) > CONTEXT_RADIUS
        cost = cost.double().masked_fill(forbidden, 4 * len(x) * (1 + float(cost.detach().abs().max())))
    order = _assignment()(cost.detach().cpu().numpy())[1]
    return z[torch.as_tensor(order, device=z.device)]


def _assignment() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as e:
        raise ConfigError(
            "objective.coupling=optimal needs scipy: run pip install 'flowtrain[ot]', or use "
            "objective.coupling=independent"
        ) from e
    return linear_sum_assignment  # type: ignore[no-any-return]


COUPLINGS: dict[str, Coupling] = {"independent": independent, "optimal": optimal}


class Matching(Objective):
    """The matching loss E_{t, (x0, x1)} |v(t, (1 - t) x0 + t x1) - (x1 - x0)|^2 of a continuous flow.

    x0 and x1 are points at the base end and at the data end of the only continuous bijection. The minimizer
    v(t, x) = E[x1 - x0 | x_t = x] transports the distribution of x0 to the distribution of x1 (Lipman et al. 2023, Flow
    matching for generative modeling, theorem 1; Liu et al. 2023, Flow straight and fast, theorem 3.3). Only the
    velocity field is trained. The likelihood of the flow can be computed as usual. Times are stratified over the batch,
    t_i = (i + u) / B in a random order. This does not change the mean of the loss, and lowers its variance.

    Raises:
        ConfigError: no continuous bijection, several of them, or a regularizer of paths, because no ODE is solved.
    """

    likelihood_from = None
    # whether the lines end at the samples of the batch, so that the weights of the samples apply
    weighted = True

    def __init__(self, flow: Flow, regularizer: Regularizer) -> None:
        super().__init__(flow, regularizer)
        if regularizer.paths or regularizer.end_time:
            raise ConfigError(
                f"regularizer: {', '.join(regularizer.integrals())} and end_time need an ODE solve, and this objective "
                f"solves no ODE: use regularizer=none ({', '.join(regularizer.penalties())} is allowed), "
                "objective=likelihood or objective=hybrid"
            )
        self.ends = Ends(flow)

    @abstractmethod
    def pairs(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns (x0, x1, context) for a training batch: the ends (B, *event) of B lines, and their context.

        The argument `context` has the form of `Flow.context_of`. The returned context has the form of `Flow.features`.
        """

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        options: SolveOptions = AS_CONFIGURED,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x0, x1, context = self.pairs(x, context)
        t = stratified(len(x1), x1)
        along = t.view(-1, *(1,) * (x1.dim() - 1))
        v = self.ends.ode_block.velocity(context)(t, torch.lerp(x0, x1, along))
        matching = weighted_mean((v - (x1 - x0)).square().flatten(1).sum(1), weights if self.weighted else None)
        loss, penalties = self.regularized(matching, {})
        return loss, {"matching": matching, **penalties}


def stratified(n: int, like: Tensor) -> Tensor:
    """Draws n stratified times (n,), in a random order.

    Each time is U(0, 1), and each interval of length 1 / n contains one time (Kingma et al. 2021, Variational diffusion
    models, appendix I).
    """
    u = torch.rand((), dtype=like.dtype, device=like.device)
    return (torch.randperm(n, device=like.device) + u) / n


class Ends:
    """The continuous bijection of a flow, with the maps from the base and from the data to its two ends.

    Attributes:
        circular: the indices of the circular columns of both ends.

    Raises:
        ConfigError: a flow that is not a chain with exactly one continuous bijection.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        parts, found = stages(flow.bijection), flow.ode_blocks
        if len(found) != 1 or found[0] not in parts:
            raise ConfigError(
                f"this objective needs a model with exactly one continuous bijection, and this model has {len(found)}: "
                "use model=ffjord model.flows=1, for images also model.scales=0, or use objective=likelihood"
            )
        self.ode_block = found[0]
        self.circular = list(flow.base.circular)
        at = parts.index(self.ode_block)
        self.before, self.after = parts[:at], parts[at + 1 :]

    @torch.no_grad()
    def from_base(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Maps base points z (B, *event_shape) to the base end of the continuous bijection, t = 0."""
        for part in self.before:
            z = part.map_forward(z, context)
        return z

    @torch.no_grad()
    def from_data(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Maps samples x (B, *event_shape) to the data end, t = 1. Integer-valued samples are dequantized first."""
        x = self.flow.dequantized(x)
        for part in reversed(self.after):
            x = part.map_inverse(x, context)
        return x

    def nearest(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Returns x1 with circular columns moved by whole turns, so that the lines from x0 to x1 are the shortest."""
        if not self.circular:
            return x1
        at = x0[:, self.circular]
        moved = x1.clone()
        moved[:, self.circular] = at + wrap(x1[:, self.circular] - at)
        return moved


class FlowMatching(Matching):
    """Flow matching: the loss of `Matching` for lines from base points to the samples of a batch.

    In circular columns the lines are the shortest ones on the circle (Chen and Lipman 2023, Flow matching on general
    geometries, section 3.2).

    Args:
        flow: the flow that is trained.
        regularizer: the regularization terms of the loss.
        coupling: the pairing of base points and samples. `independent`: random. `optimal`: minibatch optimal transport.
            For a conditional flow, points are paired within each class, or only if their contexts differ by at most
            CONTEXT_RADIUS. Otherwise the base points for a given context would not be standard normal.

    Raises:
        ConfigError: an unknown coupling, or a flow or regularizer that `Matching` does not allow.
    """

    def __init__(self, flow: Flow, regularizer: Regularizer, coupling: str = "independent") -> None:
        super().__init__(flow, regularizer)
        self.coupling = COUPLINGS[one_of("objective.coupling", coupling, COUPLINGS)]

    def pairs(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        context = self.flow.features(self.flow.context_of(context, x))
        x1 = self.ends.from_data(x, context)
        x0 = self.ends.from_base(self.flow.base.sample(len(x1), like=x1), context)
        x0 = self._coupled(x0, x1, context)
        return x0, self.ends.nearest(x0, x1), context

    def _coupled(self, x0: Tensor, x1: Tensor, context: Tensor | None) -> Tensor:
        """Returns x0 in the order of its partners x1."""
        circular = self.ends.circular
        if self.coupling is COUPLINGS["independent"]:
            return x0
        if context is None or context.is_floating_point():
            return self.coupling(x0, x1, context, circular)
        for y in self.flow.classes_with_rows:
            rows = context == y
            x0[rows] = self.coupling(x0[rows], x1[rows], None, circular)
        return x0


class Rectified(Matching):
    """Reflow: the loss of `Matching` for lines between the two ends of the paths of a teacher.

    The ends are x0 and x1 = x0 + int_0^1 v(t, x_t) dt. Each round makes the paths straighter, so that a solve needs
    fewer steps. The distribution at t = 1 does not change (Liu et al. 2023, Flow straight and fast, section 2.2 and
    theorem 3.5). The training data are not used, so the trained flow also learns the errors of the teacher.

    Circular columns of x1 are not wrapped. So a line makes the same number of turns as its path, and x1 - x0 is a
    continuous function of x0.

    Args:
        flow: the flow that is trained.
        regularizer: the regularization terms of the loss.
        contexts: returns the contexts of n training rows for a flow with context columns.
        teacher: a trained flow with the same base as `flow`, and the same bijections around the continuous bijection.
        seed: seed of the pairs.
        pairs: the number of pairs (x0, x1) that are drawn from the teacher once, before training.
        rtol: tolerance of the solves for the pairs.

    Raises:
        ConfigError: a flow, teacher or regularizer that `Matching` does not allow, bases of different types, or a
            setting out of range.
    """

    # the initial flow is the teacher: its likelihood may be better, but its paths are not straight
    start_counts = False
    weighted = False

    def __init__(
        self,
        flow: Flow,
        regularizer: Regularizer,
        teacher: Flow,
        seed: int,
        pairs: int = 100_000,
        rtol: float = 1e-4,
        contexts: Callable[[int], Tensor | None] | None = None,
    ) -> None:
        super().__init__(flow, regularizer)
        whole("objective.pairs", pairs)
        base, taught = flow.base, teacher.base
        if type(base) is not type(taught) or base.circular != taught.circular:
            raise ConfigError(
                f"the teacher has the base {type(taught).__name__}({taught.extra_repr()}) and the flow has the base "
                f"{type(base).__name__}({base.extra_repr()}): use the same base for both"
            )
        begun = time.perf_counter()
        with seeded(seed, teacher.like.device):
            given = contexts(pairs) if teacher.context and contexts is not None else None
            self.pool = draw_pairs(teacher, pairs, number("objective.rtol", rtol), given)
        log.info("%d pairs drawn from the teacher in %.1f s", pairs, time.perf_counter() - begun)

    def pairs(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        x0, x1, given = self.pool
        rows = torch.randint(len(x0), (len(x),), device=x0.device)
        return x0[rows], x1[rows], None if given is None else given[rows]


@torch.no_grad()
def draw_pairs(
    teacher: Flow, n: int, rtol: float, contexts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draws n pairs (x0, x1), the ends of paths of the teacher, (n, *event) each, and the features of their context.

    Args:
        contexts: the contexts of the pairs, (n, k), for a teacher with context columns. For a teacher with labels,
            labels are drawn.
    """
    like, solver = teacher.like, teacher.solver
    assert solver is not None
    # methods with fixed steps have no tolerance
    ends = Ends(teacher.with_solver(solver.replace(rtol=rtol, atol=rtol)) if solver.adaptive else teacher)
    z = teacher.base.sample(n, like=like)
    if teacher.classes is not None:
        contexts = teacher.drawn_labels(n)
    features = teacher.features(teacher.context_of(contexts, z))
    x0 = ends.from_base(z, features)
    x1 = []
    for rows in torch.split(torch.arange(n, device=like.device), rows_at_a_time(teacher.event_shape)):
        x1.append(ends.ode_block.map_forward(x0[rows], None if features is None else features[rows]))
    return x0, torch.cat(x1), features


class Hybrid(Objective):
    """Flow matching for the first part of a run, which is cheap, and then maximum likelihood, which is exact.

    Args:
        flow: the flow that is trained.
        regularizer: the regularization terms of the loss. Its path integrals apply only to the likelihood.
        steps: the number of steps of the whole run.
        matching: the fraction of the steps with flow matching, below 1, or the number of these steps, from 1 on.
        coupling: see `FlowMatching`.

    Raises:
        ConfigError: a flow or regularizer that one of the objectives does not allow, or a value of `matching` that
            leaves no step for one of the objectives.

    Attributes:
        pinned: stores the first likelihood step in checkpoints, so that a resumed run with another number of steps
            keeps this step.
    """

    def __init__(
        self, flow: Flow, regularizer: Regularizer, steps: int, matching: float = 0.9, coupling: str = "independent"
    ) -> None:
        super().__init__(flow, regularizer)
        share = number("objective.matching", matching)
        first = round(share * steps) if share < 1 else int(share)
        if not 0 < first < steps or (share >= 1 and first != share):
            raise ConfigError(
                f"objective.matching={matching}: with trainer.steps={steps} this is not a whole number of steps, or it "
                "leaves no step for one of the two objectives. Give a fraction below 1, or a number of steps"
            )
        self.likelihood_from = first
        self.pinned = {"matching": first}
        self.before = FlowMatching(flow, regularizer.without_paths(), coupling)
        self.after = Likelihood(flow, regularizer)
        self.current: Objective = self.before

    def switch_to_likelihood(self, step: int) -> bool:
        self.likelihood_from = step
        self.pinned = {"matching": step}
        return True

    def begin(self, step: int) -> None:
        assert self.likelihood_from is not None
        self.current = self.before if step < self.likelihood_from else self.after

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        options: SolveOptions = AS_CONFIGURED,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss: tuple[Tensor, dict[str, Tensor]] = self.current(x, context, options, weights)
        return loss
