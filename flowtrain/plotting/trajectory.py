"""The way of a flow from the base to the data: states, densities and velocities in between, all in data units."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.decomposition import between, innermost, stages, through
from flowtrain.bijections.linear import GaussianStart, InvertibleLinear, Permutation
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.scale import ActNorm, BatchNorm, Standardize
from flowtrain.flow import Flow
from flowtrain.utils.errors import FlowtrainError

# what stands at the data end only to give samples their units; everything on the way is seen through it
FRAMES = (ActNorm, BatchNorm, Standardize, Logit, GaussianStart)
# what belongs to the step before it: alone it would be one in which next to nothing happens
QUIET = (*FRAMES, Permutation, InvertibleLinear)


class Moment(NamedTuple):
    """`step` whole steps are behind, and `part` of the next one: of a continuous flow its time."""

    step: int
    part: float


class Step:
    """One stage of a flow and what is quiet after it.

    A continuous flow has states at all its times. A coupling has no state half-way: pictures move each point along a
    straight line from before to after it, and through the maps that follow it.
    """

    def __init__(self, found: list[Bijection]) -> None:
        self.whole = Chain(found)
        self.first = found[0] if found and isinstance(innermost(found[0]), Continuous) else None
        self.rest = Chain(found[1:] if self.first is not None else found)

    @property
    def is_continuous(self) -> bool:
        """Whether it is a continuous flow and nothing else: all that it shows is as the flow has it."""
        return self.first is not None and not list(self.rest)

    def states(self, y: Tensor, parts: list[float], label: Tensor | None) -> Iterator[Tensor]:
        """From y (B, *event) to each of `parts`, rising, and to the end.

        With fixed steps each is solved anew from where this step begins: from one to the next others would be taken.
        """
        origin, after = y, None
        for start, end in pairwise([0.0, *parts, 1.0]):
            if self.first is not None and end > start:
                begin, state = (start, y) if _adaptive(self.first) else (0.0, origin)
                y, after = between(self.first, begin, end).map_forward(state, label), None
            if after is None:
                after = self.rest.map_forward(y, label)
            yield torch.lerp(y, after, eased(end))


class Trajectory:
    """A flow as steps one after the other, and moments evenly spread over them.

    A step is a continuous flow, or a coupling with the scales, permutations and linear maps after it. Densities are
    exact after every step, and at every time of a continuous flow as far as its solver is; within other steps one fades
    into the next.

    Args:
        flow: in evaluation mode.
        moments: how many, from the base to the data; of a flow without continuous parts rounded up, so that there is
            one after every step.

    Raises:
        FlowtrainError: fewer than two moments.
    """

    def __init__(self, flow: Flow, moments: int) -> None:
        if moments < 2:
            raise FlowtrainError(f"moments={moments}: a way from base to data has at least two, its ends")
        found = stages(flow.bijection)
        end = len(found)
        while end and isinstance(innermost(found[end - 1]), FRAMES):
            end -= 1
        self.flow = flow
        self.frame = Chain(found[end:])
        # a base that is another Gaussian is no step
        start = int(end > 0 and isinstance(found[0], GaussianStart))
        self.base = Chain(found[:start])
        self.steps = _steps(found[start:end])
        n, intervals = len(self.steps), moments - 1
        if not flow.ode_blocks:
            intervals = -(-intervals // n) * n
        self.moments = [Moment(i * n // intervals, i * n % intervals / intervals) for i in range(intervals + 1)]

    def exact(self, count: int) -> list[Moment]:
        """At most `count` of the moments, evenly spread, none within a step where nothing is in between."""
        found = [m for m in self.moments if not m.part or self.steps[m.step].is_continuous]
        last = len(found) - 1
        return [found[round(i * last / (count - 1))] for i in range(count)] if last >= count else found

    @property
    def is_continuous(self) -> bool:
        """Whether every step is a continuous flow and nothing else."""
        return all(step.is_continuous for step in self.steps)

    def name(self, moment: Moment) -> str:
        """Such as "t = 0.25", "flow 2 of 3, t = 0.25" and "3 of 8 steps"."""
        n = len(self.steps)
        if not self.is_continuous:
            return f"{sum(moment):.3g} of {n} steps"
        number, time = self._within(moment)
        return f"t = {time:.2f}" if n == 1 else f"flow {number + 1} of {n}, t = {time:.2f}"

    def _within(self, moment: Moment) -> tuple[int, float]:
        """The step that a moment is in, and how far: the last has its end."""
        last = len(self.steps) - 1
        return (last, 1.0) if moment.step > last else (moment.step, moment.part)

    def states(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """The states at all moments, (K, B, *event) in data units, from z (B, *event)."""
        found: list[Tensor] = []
        z = self.base.map_forward(z, label)
        for number, step in enumerate(self.steps):
            parts = [moment.part for moment in self.moments if moment.step == number]
            *here, z = step.states(z, parts, label)
            found += here
        # at the last moment all steps are behind
        return torch.stack([self.frame.map_forward(y) for y in (*found, z)])

    def log_density(self, x: Tensor, moment: Moment, label: Tensor | None = None) -> Tensor:
        """log p_t(x) at a moment, (B,) in nats, for x (B, *event) in data units; label (B,) as for the flow."""
        y, log_det = self.frame.inverse(x)
        number, part = moment
        if not part:
            return log_det + self._pulled_back(y, number, label)
        first = self.steps[number].first
        if first is not None and self.steps[number].is_continuous:
            start, behind = between(first, 0.0, part).inverse(y, label)
            return log_det + behind + self._pulled_back(start, number, label)
        p = y.new_tensor(eased(part))
        before, after = (self._pulled_back(y, n, label) for n in (number, number + 1))
        return log_det + torch.logaddexp(before + (1 - p).log(), after + p.log())

    def _pulled_back(self, y: Tensor, number: int, label: Tensor | None) -> Tensor:
        """The log-density at y after the first steps, that many, before the frame."""
        total = y.new_zeros(len(y))
        for step in reversed(self.steps[:number]):
            y, log_det = step.whole.inverse(y, label)
            total = total + log_det
        z, log_det = self.base.inverse(y, label)
        return total + log_det + self.flow.base_log_prob(z)

    def velocity(self, x: Tensor, moment: Moment, label: Tensor | None = None) -> Tensor | None:
        """dx/dt at x (B, *event), in data units, at a moment of a continuous flow; None of any other step."""
        number, time = self._within(moment)
        first = self.steps[number].first
        if first is None or not self.steps[number].is_continuous:
            return None
        flow, y = innermost(first), self.frame.map_inverse(x)
        assert isinstance(flow, Continuous)
        v = through(first, lambda inside: flow.velocity(label)(inside.new_tensor(time), inside), y)
        if not list(self.frame):
            # torch takes a second to load what its first jvp needs
            return v
        velocity: Tensor = torch.func.jvp(self.frame.map_forward, (y,), (v,))[1]
        return velocity


def _adaptive(stage: Bijection) -> bool:
    """Whether a continuous flow is solved by steps that its tolerance sets."""
    flow = innermost(stage)
    return isinstance(flow, Continuous) and flow.solver.adaptive


def eased(part: float) -> float:
    """3 p^2 - 2 p^3: from 0 to 1, at rest at both ends.

    >>> eased(0.0), eased(0.5), eased(1.0)
    (0.0, 0.5, 1.0)
    """
    return part * part * (3 - 2 * part)


def _steps(found: list[Bijection]) -> list[Step]:
    """Each from one stage that is not quiet to the next; what is quiet at the base is one by itself."""
    groups: list[list[Bijection]] = []
    for stage in found:
        if groups and isinstance(innermost(stage), QUIET):
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return [Step(group) for group in groups or [[]]]
