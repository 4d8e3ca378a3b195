"""Flow matching first, likelihood after."""

from dataclasses import replace

from torch import Tensor

from flowtrain.checks import number
from flowtrain.errors import ConfigError
from flowtrain.flow import Flow
from flowtrain.objectives.base import Objective
from flowtrain.objectives.flow_matching import FlowMatching
from flowtrain.objectives.likelihood import Likelihood
from flowtrain.regularizers import Regularizer


class Hybrid(Objective):
    """The cheap loss while the field is far from the data, and the exact one once it is near.

    Args:
        steps: of the whole run.
        matching: the share of them that flow matching takes, in (0, 1).
        coupling: see `FlowMatching`.
        regularizer: its path integrals are those of the likelihood's steps.

    Raises:
        ConfigError: what either objective refuses, or a share that leaves one of them no step.
    """

    def __init__(
        self, flow: Flow, regularizer: Regularizer, steps: int, matching: float, coupling: str = "independent"
    ) -> None:
        super().__init__(flow, regularizer)
        first = round(number("objective.matching", matching) * steps)
        if not 0 < first < steps:
            raise ConfigError(
                f"objective.matching={matching} of trainer.steps={steps} leaves one of the two objectives no step: "
                "give a share between 0 and 1"
            )
        self.likelihood_from = first
        layers_alone = replace(regularizer, kinetic=0.0, jacobian=0.0, acceleration=0.0, end_time=0.0)
        self.matching = FlowMatching(flow, layers_alone, coupling)
        self.likelihood = Likelihood(flow, regularizer)
        self.current: Objective = self.matching

    def begin(self, step: int) -> None:
        assert self.likelihood_from is not None
        self.current = self.matching if step < self.likelihood_from else self.likelihood

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss: tuple[Tensor, dict[str, Tensor]] = self.current(x, label)
        return loss
