"""Flow matching, rectified flow, and flow matching followed by maximum likelihood."""

import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowtrain.bijections.decomposition import stages
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.flow import Flow, rows_at_a_time
from flowtrain.objectives.base import Objective
from flowtrain.objectives.likelihood import Likelihood
from flowtrain.ode import AS_CONFIGURED, SolveOptions
from flowtrain.utils.arguments import number, one_of, whole
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.process import seeded

log = logging.getLogger("flowtrain")


Coupling = Callable[[Tensor, Tensor], Tensor]


def independent(z: Tensor, x: Tensor) -> Tensor:
    """z (B, *event) as it is: any base point to any sample."""
    return z


def optimal(z: Tensor, x: Tensor) -> Tensor:
    """z in the order that minimizes sum_i |z_i - x_i|^2 over all pairings of the batch, exactly.

    (Pooladian et al. 2023, Multisample flow matching, eq. 9; Tong et al. 2024, Improving and generalizing flow-based
    generative models with minibatch optimal transport, section 3.2.) Solved on the CPU, in time that grows with B^3.

    Shapes: z, x and the result (B, *event).

    Raises:
        ConfigError: scipy is not installed.

    Example:
        >>> optimal(torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0]]))
        tensor([[5.],
                [0.]])
    """
    # |z|^2 and |x|^2 are the same for every pairing
    cost = -(x.flatten(1) @ z.flatten(1).T)
    order = _assignment()(cost.detach().cpu().numpy())[1]
    return z[torch.as_tensor(order, device=z.device)]


def _assignment() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as e:
        raise ConfigError(
            "objective.coupling=optimal needs scipy (pip install 'flowtrain[ot]'); or take coupling=independent"
        ) from e
    return linear_sum_assignment  # type: ignore[no-any-return]


COUPLINGS: dict[str, Coupling] = {"independent": independent, "optimal": optimal}


class Matching(Objective):
    """E_{t, (x0, x1)} |v(t, (1 - t) x0 + t x1) - (x1 - x0)|^2, x0 and x1 at the two ends of the one continuous flow.

    Its minimizer v(t, x) = E[x1 - x0 | x_t = x] carries the distribution of x0 to that of x1 (Lipman et al. 2023, Flow
    matching for generative modeling, theorem 1; Liu et al. 2023, Flow straight and fast, theorem 3.3). The field alone
    is trained, not the base; the likelihood is then that of any continuous flow. Times are stratified over the batch,
    t_i = (i + u) / B in a random order, which leaves the mean as it is and takes most of their variance.

    Raises:
        ConfigError: a flow of no or several continuous parts, or a regularizer of paths, of which none is solved here.
    """

    likelihood_from = None

    def __init__(self, flow: Flow, regularizer: Regularizer) -> None:
        super().__init__(flow, regularizer)
        if regularizer.paths or regularizer.end_time:
            raise ConfigError(
                f"regularizer: {', '.join(regularizer.integrals())} and end_time are of paths that are solved, and "
                f"this objective solves none: take regularizer=none ({', '.join(regularizer.penalties())} may stay), "
                "or objective=likelihood or hybrid"
            )
        self.ends = Ends(flow)

    @abstractmethod
    def pairs(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x0, x1, label) for a training batch: the ends of B lines, (B, *event) each, and labels (B,) or None."""

    def forward(
        self, x: Tensor, label: Tensor | None = None, options: SolveOptions = AS_CONFIGURED
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x0, x1, label = self.pairs(x, label)
        t = stratified(len(x1), x1)
        along = t.view(-1, *(1,) * (x1.dim() - 1))
        v = self.ends.ode_block.velocity(label)(t, torch.lerp(x0, x1, along))
        matching = (v - (x1 - x0)).square().flatten(1).sum(1).mean()
        loss, penalties = self.regularized(matching, {})
        return loss, {"matching": matching, **penalties}


def stratified(n: int, like: Tensor) -> Tensor:
    """n times (n,), each U(0, 1), one in each interval of 1 / n, in a random order (Kingma et al. 2021, Variational
    diffusion models, appendix I).
    """
    u = torch.rand((), dtype=like.dtype, device=like.device)
    return (torch.randperm(n, device=like.device) + u) / n


class Ends:
    """The continuous part of a flow, and the way to its two ends: from the base, and from the data.

    Raises:
        ConfigError: a flow that is not a chain around one continuous part.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        parts, found = stages(flow.bijection), flow.ode_blocks
        if len(found) != 1 or found[0] not in parts:
            raise ConfigError(
                f"this objective trains a flow with one continuous part, and the model has {len(found)}: use "
                "model=ffjord model.flows=1, over images with model.scales=0 as well, or objective=likelihood"
            )
        self.ode_block = found[0]
        at = parts.index(self.ode_block)
        self.before, self.after = parts[:at], parts[at + 1 :]

    @torch.no_grad()
    def from_base(self, z: Tensor, label: Tensor | None) -> Tensor:
        """Where base points z (B, *event_shape) enter the continuous part at t = 0."""
        for part in self.before:
            z = part.map_forward(z, label)
        return z

    @torch.no_grad()
    def from_data(self, x: Tensor, label: Tensor | None) -> Tensor:
        """Where samples x (B, *event_shape) enter it at t = 1; those of an integer-valued flow with noise added."""
        x = self.flow.dequantized(x)
        for part in reversed(self.after):
            x = part.map_inverse(x, label)
        return x


class FlowMatching(Matching):
    """Lines from base points to the samples of a batch, paired as `coupling` says; see `Matching`.

    Args:
        coupling: independent | optimal (minibatch optimal transport, of a conditional flow within each class, whose
            base points would not be standard normal else).

    Raises:
        ConfigError: an unknown coupling, or what `Matching` refuses.
    """

    def __init__(self, flow: Flow, regularizer: Regularizer, coupling: str = "independent") -> None:
        super().__init__(flow, regularizer)
        self.coupling = COUPLINGS[one_of("objective.coupling", coupling, COUPLINGS)]

    def pairs(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        label = self.flow.labels(label, x)
        x1 = self.ends.from_data(x, label)
        x0 = self.ends.from_base(self.flow.base.sample(len(x1), like=x1), label)
        if label is None or self.coupling is COUPLINGS["independent"]:
            return self.coupling(x0, x1), x1, label
        for y in self.flow.seen:
            rows = label == y
            x0[rows] = self.coupling(x0[rows], x1[rows])
        return x0, x1, label


class Rectified(Matching):
    """Reflow: lines between the ends of a teacher's paths, x0 and x1 = x0 + int_0^1 v(t, x_t) dt; see `Matching`.

    The paths become straighter with each round, and few steps solve them, while the distribution at t = 1 stays
    (Liu et al. 2023, Flow straight and fast, section 2.2 and theorem 3.5). The data are not looked at again: what the
    teacher has wrong, its student has too.

    Args:
        teacher: the trained flow, with the same base and the same bijections around its continuous part as `flow`.
        pairs: how many pairs are drawn from it, once, before training.
        rtol: tolerance of the solves that draw them.
        seed: of the pairs.

    Raises:
        ConfigError: what `Matching` refuses, of either flow, bases of two types, or a setting out of range.
    """

    # it is the teacher, whose likelihood may well be better, but whose paths are not straight
    start_counts = False

    def __init__(
        self, flow: Flow, regularizer: Regularizer, teacher: Flow, seed: int, pairs: int = 100_000, rtol: float = 1e-4
    ) -> None:
        super().__init__(flow, regularizer)
        whole("objective.pairs", pairs)
        if type(flow.base) is not type(teacher.base):
            raise ConfigError(
                f"the paths of the teacher begin at its base, {type(teacher.base).__name__}, and the flow has another, "
                f"{type(flow.base).__name__}: give both the same"
            )
        begun = time.perf_counter()
        with seeded(seed, teacher.like.device):
            self.pool = drawn(teacher, pairs, number("objective.rtol", rtol))
        log.info("%d pairs drawn from the teacher in %.1f s", pairs, time.perf_counter() - begun)

    def pairs(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        x0, x1, labels = self.pool
        rows = torch.randint(len(x0), (len(x),), device=x0.device)
        return x0[rows], x1[rows], None if labels is None else labels[rows]


@torch.no_grad()
def drawn(teacher: Flow, n: int, rtol: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """n pairs (x0, x1) of the ends of a flow's continuous part, (n, *event) each, and their labels (n,) or None."""
    like, solver = teacher.like, teacher.solver
    assert solver is not None
    # a fixed-step method keeps its steps
    ends = Ends(teacher.with_solver(solver.replace(rtol=rtol, atol=rtol)) if solver.adaptive else teacher)
    z = teacher.base.sample(n, like=like)
    labels = None if teacher.classes is None else teacher.drawn_labels(n)
    x0 = ends.from_base(z, labels)
    x1 = []
    for rows in torch.split(torch.arange(n, device=like.device), rows_at_a_time(teacher.event_shape)):
        x1.append(ends.ode_block.map_forward(x0[rows], None if labels is None else labels[rows]))
    return x0, torch.cat(x1), labels


class Hybrid(Objective):
    """The cheap loss while the field is far from the data, and the exact one once it is near.

    Args:
        steps: of the whole run.
        matching: the share of them that flow matching takes, in (0, 1), or from 1 on how many.
        coupling: see `FlowMatching`.
        regularizer: its path integrals are those of the likelihood's steps.

    Raises:
        ConfigError: what either objective refuses, or a share that leaves one of them no step.

    Attributes:
        pinned: keeps the step of the change where a run goes on to another number of steps.
    """

    def __init__(
        self, flow: Flow, regularizer: Regularizer, steps: int, matching: float = 0.9, coupling: str = "independent"
    ) -> None:
        super().__init__(flow, regularizer)
        share = number("objective.matching", matching)
        first = round(share * steps) if share < 1 else int(share)
        if not 0 < first < steps or (share >= 1 and first != share):
            raise ConfigError(
                f"objective.matching={matching} of trainer.steps={steps} leaves one of the two objectives no step, or "
                "is no whole number: give a share below 1, or how many"
            )
        self.likelihood_from = first
        self.pinned = {"matching": first}
        self.before = FlowMatching(flow, regularizer.without_paths(), coupling)
        self.after = Likelihood(flow, regularizer)
        self.current: Objective = self.before

    def take_over(self, step: int) -> bool:
        self.likelihood_from = step
        self.pinned = {"matching": step}
        return True

    def begin(self, step: int) -> None:
        assert self.likelihood_from is not None
        self.current = self.before if step < self.likelihood_from else self.after

    def forward(
        self, x: Tensor, label: Tensor | None = None, options: SolveOptions = AS_CONFIGURED
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss: tuple[Tensor, dict[str, Tensor]] = self.current(x, label, options)
        return loss
