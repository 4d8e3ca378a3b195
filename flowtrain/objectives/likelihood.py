"""Maximum likelihood."""

import torch
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.errors import ConfigError
from flowtrain.flow import Flow
from flowtrain.regularizers import Regularizer, record_paths, spectral


class Likelihood(nn.Module):
    """The negative log-likelihood, -mean log p(x), in nats per sample, and what a regularizer adds to it.

    The loss is computed in `forward` so that a wrapper such as DistributedDataParallel sees it.

    Raises:
        ConfigError: a regularizer, and a flow without paths.
    """

    def __init__(self, flow: Flow, regularizer: Regularizer) -> None:
        super().__init__()
        self.flow, self.regularizer = flow, regularizer
        self.continuous = [m for m in flow.modules() if isinstance(m, Continuous)]
        if regularizer.active and not self.continuous:
            raise ConfigError(
                "regularizer: this flow has no paths to regularize; use regularizer=none, or model=ffjord"
            )
        for m in self.continuous:
            m.regularizer = regularizer

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its terms by name): nll, and each regularizer before its weight."""
        with record_paths() as paths:
            nll = -self.flow.log_prob(x, label).mean()
        terms: dict[str, Tensor] = {"nll": nll}
        for i, name in enumerate(self.regularizer.paths):
            terms[name] = torch.stack([p[:, i].mean() for p in paths]).sum()
        if self.regularizer.spectral:
            terms["spectral"] = torch.stack([spectral(m.field) for m in self.continuous]).sum()
        loss = nll
        for name in [*terms][1:]:
            loss = loss + getattr(self.regularizer, name) * terms[name]
        return loss, terms
