"""The maximum likelihood objective."""

import torch
from torch import Tensor

from flowtrain.bijections.regularizers import Regularizer
from flowtrain.flow import Flow
from flowtrain.objectives.base import Objective, weighted_mean
from flowtrain.ode import AS_CONFIGURED, SolveOptions
from flowtrain.utils.errors import ConfigError


class Likelihood(Objective):
    """The (weighted) negative log-likelihood -mean log p(x), in nats per sample, plus the terms of a regularizer.

    Raises:
        ConfigError: a regularizer for a flow without ODE.
    """

    def __init__(self, flow: Flow, regularizer: Regularizer) -> None:
        super().__init__(flow, regularizer)
        if regularizer.active and not flow.ode_blocks:
            raise ConfigError(
                "regularizer: this flow has no ODE, and so no paths to regularize: use regularizer=none or model=ffjord"
            )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        options: SolveOptions = AS_CONFIGURED,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its terms by name: nll, and each regularization term without its weight."""
        log_p, _, integrals = self.flow.density_pass(x, context, self.regularizer.options(options))
        nll = -weighted_mean(log_p, weights)
        names = self.regularizer.paths
        penalties = {
            name: torch.stack([weighted_mean(q[:, i], weights) for q in integrals]).sum()
            for i, name in enumerate(names)
        }
        loss, penalties = self.regularized(nll, penalties)
        return loss, {"nll": nll, **penalties}
