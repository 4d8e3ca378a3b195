"""Maximum likelihood."""

from torch import Tensor, nn

from flowtrain.flow import Flow


class Likelihood(nn.Module):
    """The negative log-likelihood, -mean log p(x), in nats per sample.

    The loss is computed in `forward` so that a wrapper such as DistributedDataParallel sees it.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return -self.flow.log_prob(x, label).mean()
