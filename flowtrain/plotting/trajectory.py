"""The transport of a flow from the base to the data: states, densities and velocities in between, in data units."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.coupling import Coupling
from flowtrain.bijections.decomposition import between, evaluate_inside, innermost, stages
from flowtrain.bijections.linear import GaussianStart, InvertibleLinear, Permutation
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.scale import ActNorm, BatchNorm, Standardize
from flowtrain.bijections.support import ToSupport
from flowtrain.flow import Flow
from flowtrain.utils.errors import FlowtrainError

# the types of layers at the data end that convert states to data units. They are applied to the states of all moments
FRAMES = (ActNorm, BatchNorm, Standardize, Logit, ToSupport, GaussianStart)
# the types of layers that belong to the step before them, because they change a density very little
QUIET = (*FRAMES, Permutation, InvertibleLinear)


class Moment(NamedTuple):
    """A moment after `step` steps and the share `part` of the next step. In a continuous flow, `part` is the time."""

    step: int
    part: float


class Step:
    """One stage of a flow with the QUIET layers after it.

    A continuous flow has a state at each time. A coupling has no states between its ends. Pictures move each point on a
    straight line from its position before the step to its position after the step.
    """

    def __init__(self, found: list[Bijection]) -> None:
        self.stages = found
        self.whole = Chain(found)
        self.first = found[0] if found and isinstance(innermost(found[0]), Continuous) else None
        self.rest = Chain(found[1:] if self.first is not None else found)

    @property
    def is_continuous(self) -> bool:
        """Whether the step is a continuous flow without layers after it."""
        return self.first is not None and not list(self.rest)

    def states(self, y: Tensor, parts: list[float], context: Tensor | None) -> Iterator[Tensor]:
        """Yields the states at each of `parts` and at the end of the step. The state at the start is y (B, *event).

        The parts are in ascending order. A solver with fixed steps starts each time from y, because its steps depend on
        the interval.
        """
        origin, after = y, None
        for start, end in pairwise([0.0, *parts, 1.0]):
            if self.first is not None and end > start:
                begin, state = (start, y) if _adaptive(self.first) else (0.0, origin)
                y, after = between(self.first, begin, end).map_forward(state, context), None
            if after is None:
                after = self.rest.map_forward(y, context)
            yield torch.lerp(y, after, smoothstep(end))


class Trajectory:
    """A flow as a sequence of steps, and moments that are evenly spread over them.

    A step is a continuous flow, or a coupling with the scales, permutations and linear maps after it. Densities are
    exact after each step, and at each time of a continuous flow up to the error of the solver. Within other steps, the
    density is a mixture of the densities before and after the step.

    Args:
        flow: a flow in evaluation mode.
        moments: the number of moments, from the base to the data. It is rounded up for a flow without continuous parts,
            so that there is a moment after each step.

    Raises:
        FlowtrainError: fewer than two moments.
    """

    def __init__(self, flow: Flow, moments: int) -> None:
        if moments < 2:
            raise FlowtrainError(f"moments={moments}: give at least 2, the base and the data")
        found = stages(flow.bijection)
        end = len(found)
        while end and isinstance(innermost(found[end - 1]), FRAMES):
            end -= 1
        self.flow = flow
        self.frame = Chain(found[end:])
        # a map from the standard normal base to another Gaussian is part of the base
        start = int(end > 0 and isinstance(found[0], GaussianStart))
        self.base = Chain(found[:start])
        self.steps = _steps(found[start:end])
        n, intervals = len(self.steps), moments - 1
        if not flow.ode_blocks:
            intervals = -(-intervals // n) * n
        self.moments = [Moment(i * n // intervals, i * n % intervals / intervals) for i in range(intervals + 1)]

    def exact(self, count: int) -> list[Moment]:
        """Returns up to `count` evenly spread moments. Moments inside steps that are not continuous are left out."""
        found = [m for m in self.moments if not m.part or self.steps[m.step].is_continuous]
        last = len(found) - 1
        return [found[round(i * last / (count - 1))] for i in range(count)] if last >= count else found

    @property
    def is_continuous(self) -> bool:
        """Whether each step is a continuous flow without other layers."""
        return all(step.is_continuous for step in self.steps)

    @property
    def kind(self) -> str:
        """The name of a step: flow, coupling or layer."""
        if self.is_continuous:
            return "flow"
        coupled = all(step.stages and isinstance(innermost(step.stages[0]), Coupling) for step in self.steps)
        return "coupling" if coupled else "layer"

    @property
    def axis(self) -> str:
        """The name of an axis of moments, which are numbers of steps."""
        if not self.is_continuous:
            return f"{self.kind}s applied"
        return "time t" if len(self.steps) == 1 else "time t, one unit for each flow"

    def name(self, moment: Moment) -> str:
        """Returns the name of a moment, such as "t = 0.25", "flow 2 of 3, t = 0.25" and "after 3 of 8 couplings".

        A moment within the fourth of eight couplings is "coupling 4 of 8".
        """
        n = len(self.steps)
        if self.is_continuous:
            number, time = self._within(moment)
            return f"t = {time:.2f}" if n == 1 else f"flow {number + 1} of {n}, t = {time:.2f}"
        if moment.part:
            return f"{self.kind} {moment.step + 1} of {n}"
        if moment.step == 0:
            return "base"
        return f"after {moment.step} of {n} {self.kind}s" if n > 1 else f"after the {self.kind}"

    def _within(self, moment: Moment) -> tuple[int, float]:
        """Returns the number of the step that contains a moment, and the time in this step."""
        last = len(self.steps) - 1
        return (last, 1.0) if moment.step > last else (moment.step, moment.part)

    def states(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the states at all moments, (K, B, *event) in data units, from z (B, *event)."""
        found: list[Tensor] = []
        z = self.base.map_forward(z, context)
        for number, step in enumerate(self.steps):
            parts = [moment.part for moment in self.moments if moment.step == number]
            *here, z = step.states(z, parts, context)
            found += here
        # the last moment is after all steps
        return torch.stack([self.frame.map_forward(y) for y in (*found, z)])

    def paths(self, z: Tensor, shown: Sequence[Moment], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the states (K, B, *event) at some `exact` moments, and their log densities (K, B) in nats.

        For continuous flows with an adaptive solver, the log-determinants of the intervals between moments are summed,
        so each interval is solved once. Otherwise, `log_density` computes every log density.

        Args:
            z: base points, (B, *event).
        """
        if self.is_continuous and all(_adaptive(step.stages[0]) for step in self.steps):
            found = dict(zip(self.moments, self._solved_path(z, context), strict=True))
            return torch.stack([found[moment][0] for moment in shown]), torch.stack([found[m][1] for m in shown])
        states = dict(zip(self.moments, self.states(z, context), strict=True))
        along = [self.log_density(states[moment], moment, context) for moment in shown]
        return torch.stack([states[moment] for moment in shown]), torch.stack(along)

    def _solved_path(self, z: Tensor, context: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the state and the log density at each moment."""
        y, log_det = self.base.forward(z, context)
        log_p = self.flow.base_log_prob(z, context) - log_det
        for before, moment in pairwise([self.moments[0], *self.moments]):
            if moment != before:
                end = moment.part if moment.step == before.step else 1.0
                y, log_det = between(self.steps[before.step].stages[0], before.part, end).forward(y, context)
                log_p = log_p - log_det
            x, log_det = self.frame.forward(y)
            yield x, log_p - log_det

    def log_density(self, x: Tensor, moment: Moment, context: Tensor | None = None) -> Tensor:
        """Returns log p_t(x) at a moment, (B,) in nats, for x (B, *event) in data units.

        Args:
            context: the result of `Flow.features` for each row.
        """
        y, log_det = self.frame.inverse(x)
        number, part = moment
        if not part:
            return log_det + self._pulled_back(y, number, context)
        first = self.steps[number].first
        if first is not None and self.steps[number].is_continuous:
            start, behind = between(first, 0.0, part).inverse(y, context)
            return log_det + behind + self._pulled_back(start, number, context)
        p = y.new_tensor(smoothstep(part))
        before, after = (self._pulled_back(y, n, context) for n in (number, number + 1))
        return log_det + torch.logaddexp(before + (1 - p).log(), after + p.log())

    def _pulled_back(self, y: Tensor, number: int, context: Tensor | None) -> Tensor:
        """Returns the log density after the first `number` steps at y, in the coordinates before `frame`."""
        total = y.new_zeros(len(y))
        for step in reversed(self.steps[:number]):
            y, log_det = step.whole.inverse(y, context)
            total = total + log_det
        z, log_det = self.base.inverse(y, context)
        return total + log_det + self.flow.base_log_prob(z, context)

    def velocity(self, x: Tensor, moment: Moment, context: Tensor | None = None) -> Tensor | None:
        """Returns dx/dt at x (B, *event) in data units, at a moment of a continuous flow; None for other steps."""
        number, time = self._within(moment)
        first = self.steps[number].first
        if first is None or not self.steps[number].is_continuous:
            return None
        flow, y = innermost(first), self.frame.map_inverse(x)
        assert isinstance(flow, Continuous)
        v = evaluate_inside(first, lambda inside: flow.velocity(context)(inside.new_tensor(time), inside), y)
        if not list(self.frame):
            # v is already in data units. This avoids the first jvp of a process, which takes a second
            return v
        velocity: Tensor = torch.func.jvp(self.frame.map_forward, (y,), (v,))[1]
        return velocity


def _adaptive(stage: Bijection) -> bool:
    """Whether a stage is a continuous flow with an adaptive solver."""
    flow = innermost(stage)
    return isinstance(flow, Continuous) and flow.solver.adaptive


def smoothstep(part: float) -> float:
    """Returns the smooth step 3 p^2 - 2 p^3, which rises from 0 to 1 with slope 0 at both ends.

    >>> smoothstep(0.0), smoothstep(0.5), smoothstep(1.0)
    (0.0, 0.5, 1.0)
    """
    return part * part * (3 - 2 * part)


def _steps(found: list[Bijection]) -> list[Step]:
    """Groups stages into steps. A step starts with a stage that is not QUIET. QUIET stages at the base are one step."""
    groups: list[list[Bijection]] = []
    for stage in found:
        if groups and isinstance(innermost(stage), QUIET):
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return [Step(group) for group in groups or [[]]]
