"""What every objective is: a loss and its terms, and when it begins to solve the ODE."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.bijections.regularizers import Regularizer
from flowtrain.flow import Flow
from flowtrain.ode import AS_CONFIGURED, SolveOptions


class Objective(nn.Module, ABC):
    """What training minimizes.

    In `forward`, so that `trainer.compile` can compile the whole of it (`training.initialization.compile_parts`).

    Attributes:
        flow: what is trained.
        likelihood_from: the first step that maximizes the likelihood, and so solves the ODE of a continuous flow;
            None: no step does. Learning rate, tolerance and averaging begin anew there.
        start_counts: whether the flow before the first step can become the best checkpoint. It cannot where training
            trades likelihood for something else.
        pinned: what checkpoints keep of the objective's keys in place of what the run was given.
    """

    likelihood_from: int | None = 0
    start_counts = True
    pinned: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, flow: Flow, regularizer: Regularizer) -> None:
        super().__init__()
        self.flow, self.regularizer = flow, regularizer

    def take_over(self, step: int) -> bool:
        """Has the likelihood begin at that step, earlier than `likelihood_from`; False where that cannot be moved."""
        return False

    def begin(self, step: int) -> None:
        """Told of each step before its loss is taken; nothing, for losses that are the same throughout."""

    @abstractmethod
    def forward(
        self, x: Tensor, label: Tensor | None = None, options: SolveOptions = AS_CONFIGURED
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its terms by name) of x (B, *event_shape), label (B,) or None; `nll` in nats where it is taken.

        Args:
            options: how this step solves the ODE, for example with the tolerance of the warm-up.
        """

    def regularized(self, loss: Tensor, terms: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with the weighted `terms` of the regularizer added, and with its penalties on fields."""
        terms = dict(terms)
        for name, penalty in self.regularizer.on_fields.items():
            terms[name] = torch.stack([penalty(m.field) for m in self.flow.ode_blocks]).sum()
        for name, term in terms.items():
            loss = loss + getattr(self.regularizer, name) * term
        return loss, terms
