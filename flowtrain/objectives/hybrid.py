"""Flow matching first, likelihood after."""

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
        matching: the share of them that flow matching takes, in (0, 1), or from 1 on how many.
        coupling: see `FlowMatching`.
        regularizer: its path integrals are those of the likelihood's steps.

    Raises:
        ConfigError: what either objective refuses, or a share that leaves one of them no step.

    Attributes:
        pinned: keeps the step of the change where a run goes on to another number of steps.
    """

    def __init__(
        self, flow: Flow, regularizer: Regularizer, steps: int, matching: float, coupling: str = "independent"
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

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss: tuple[Tensor, dict[str, Tensor]] = self.current(x, label)
        return loss
