"""The base class of objectives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.bijections.regularizers import Regularizer
from flowtrain.flow import Flow
from flowtrain.ode import AS_CONFIGURED, SolveOptions
from flowtrain.utils.errors import CheckpointError, FlowtrainError


class Objective(nn.Module, ABC):
    """A training loss of a flow.

    `forward` computes the loss, and `trainer.compile` compiles `forward` (`training.initialization.compile_parts`).

    Attributes:
        flow: the flow that is trained.
        regularizer: the regularization terms of the loss.
        likelihood_from: the first step that maximizes the likelihood, with an ODE solve for a continuous flow. The
            schedules of learning rate, tolerance and weight averaging restart at this step. None: no such step.
        uses_target: whether the loss is computed from the density of a target, and not from samples.
        raises_log_prob: whether a larger log p at `rows_to_check` lowers the loss. The solver guard uses it.
        start_counts: whether the flow before the first step can become the best checkpoint. False for objectives that
            may lower the likelihood for another goal.
        pinned: values that replace config keys of the objective in checkpoints.
    """

    likelihood_from: int | None = 0
    uses_target = False
    raises_log_prob = True
    start_counts = True
    pinned: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, flow: Flow, regularizer: Regularizer) -> None:
        super().__init__()
        self.flow, self.regularizer = flow, regularizer

    def switch_to_likelihood(self, step: int) -> bool:
        """Moves `likelihood_from` to `step`, an earlier step. Returns False if the objective does not support this."""
        return False

    def follow_schedule(self, position: float) -> None:
        """Sets values that follow the schedule of the learning rate. The trainer calls this before each step.

        The default does nothing.

        Args:
            position: the position of the schedule in steps. It exceeds the step if the time limit allows fewer steps
                than `trainer.steps`.
        """

    def begin(self, step: int) -> None:
        """Prepares the loss of a training step. The trainer calls this before each step. The default does nothing."""

    def rows_to_check(self, x: Tensor) -> Tensor:
        """Returns the rows at which the solver guard compares log p with a tight solve, for a batch x of a step."""
        return x

    def diagnose_failure(self, x: Tensor) -> FlowtrainError | None:
        """Returns an error that names the cause of a loss that is not finite, for a batch x. None if it is unknown."""
        return None

    def state(self) -> dict[str, Any] | None:
        """Returns the state for resuming a run, as plain values and tensors. None without state."""
        return None

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state`, which may come from a damaged or a manipulated file.

        Raises:
            CheckpointError: the state is not a valid result of `state`.
        """
        raise CheckpointError(f"the checkpoint is damaged: {type(self).__name__} has no state")

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        options: SolveOptions = AS_CONFIGURED,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of a batch.

        Args:
            x: samples (B, *event_shape).
            context: values (B, k) of context columns, or labels (B,), or None.
            options: options of the ODE solves in this step, for example the tolerance of the warm-up.
            weights: weights (B,) of the samples, with a mean of 1 over all training rows, or None.

        Returns:
            The loss and its terms by name. The term `nll`, in nats, exists only if the step computes it.
        """

    def regularized(self, loss: Tensor, terms: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the weighted regularization `terms` and the penalties on fields. Returns the loss and all terms."""
        terms = dict(terms)
        for name, penalty in self.regularizer.on_fields.items():
            terms[name] = torch.stack([penalty(m.field) for m in self.flow.ode_blocks]).sum()
        for name, term in terms.items():
            loss = loss + getattr(self.regularizer, name) * term
        return loss, terms


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Returns mean_i w_i v_i for values (B,), or their mean without weights.

    The sum is divided by B and not by the sum of the weights of the batch. The expectation over batches is then the
    weighted mean over all rows, because the weights have a mean of 1 over all training rows.
    """
    return values.mean() if weights is None else (values * weights.to(values)).mean()
