"""Maximum likelihood."""

import torch
from torch import Tensor

from flowtrain.bijections.continuous import Regularizer, record_paths
from flowtrain.flow import Flow
from flowtrain.objectives.base import Objective
from flowtrain.utils.errors import ConfigError


class Likelihood(Objective):
    """The negative log-likelihood, -mean log p(x), in nats per sample, and what a regularizer adds to it.

    Raises:
        ConfigError: a regularizer, and a flow without paths.
    """

    def __init__(self, flow: Flow, regularizer: Regularizer) -> None:
        super().__init__(flow, regularizer)
        if regularizer.active and not flow.ode_blocks:
            raise ConfigError(
                "regularizer: this flow has no paths to regularize; use regularizer=none, or model=ffjord"
            )
        for m in flow.ode_blocks:
            m.regularizer = regularizer

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its terms by name): nll, and each regularizer before its weight."""
        with record_paths() as paths:
            nll = -self.flow.log_prob(x, label).mean()
        names = self.regularizer.paths
        penalties = {name: torch.stack([p[:, i].mean() for p in paths]).sum() for i, name in enumerate(names)}
        loss, penalties = self.regularized(nll, penalties)
        return loss, {"nll": nll, **penalties}
