"""Regression of the velocity on straight lines from base to data: training without a solve."""

from abc import abstractmethod

import torch
from torch import Tensor

from flowtrain.bijections.stages import stages
from flowtrain.errors import ConfigError
from flowtrain.flow import Flow
from flowtrain.objectives.base import Objective
from flowtrain.regularizers import Regularizer


class Matching(Objective):
    """E_{t, (x0, x1)} |v(t, (1 - t) x0 + t x1) - (x1 - x0)|^2, x0 and x1 at the two ends of the one continuous flow.

    Its minimizer v(t, x) = E[x1 - x0 | x_t = x] carries the distribution of x0 to that of x1 (Lipman et al. 2023, Flow
    matching for generative modeling, theorem 1; Liu et al. 2023, Flow straight and fast, theorem 3.3). The field alone
    is trained; the likelihood is then that of any continuous flow. Times are stratified over the batch, t_i = (i + u) /
    B in a random order, which leaves the mean as it is and takes most of their variance.

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

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        x0, x1, label = self.pairs(x, label)
        t = stratified(len(x1), x1)
        along = t.view(-1, *(1,) * (x1.dim() - 1))
        v = self.ends.continuous.velocity(label)(t, torch.lerp(x0, x1, along))
        matching = (v - (x1 - x0)).square().flatten(1).sum(1).mean()
        loss, penalties = self.regularized(matching, {})
        return loss, {"matching": matching, **penalties}


def stratified(n: int, like: Tensor) -> Tensor:
    """n times (n,), each U(0, 1), one in each interval of 1 / n, in a random order (Kingma et al. 2021, Variational
    diffusion models, appendix I)."""
    u = torch.rand((), dtype=like.dtype, device=like.device)
    return (torch.randperm(n, device=like.device) + u) / n


class Ends:
    """The continuous part of a flow, and the way to its two ends: from the base, and from the data.

    Raises:
        ConfigError: a flow that is not a chain around one continuous part.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        parts, found = stages(flow.bijection), flow.continuous
        if len(found) != 1 or found[0] not in parts:
            raise ConfigError(
                f"this objective trains a flow with one continuous part, and the model has {len(found)}: use "
                "model=ffjord model.flows=1, over images with model.scales=0 as well, or objective=likelihood"
            )
        self.continuous = found[0]
        at = parts.index(self.continuous)
        self.before, self.after = parts[:at], parts[at + 1 :]

    @torch.no_grad()
    def from_base(self, z: Tensor, label: Tensor | None) -> Tensor:
        """Where base points z (B, *event_shape) enter the continuous part at t = 0."""
        for part in self.before:
            z = part.map_forward(z, label)
        return z

    @torch.no_grad()
    def from_data(self, x: Tensor, label: Tensor | None) -> Tensor:
        """Where samples x (B, *event_shape) enter it at t = 1; those of a discrete flow with noise added."""
        x = self.flow.dequantized(x)
        for part in reversed(self.after):
            x = part.map_inverse(x, label)
        return x
