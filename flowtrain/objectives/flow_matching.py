"""Conditional flow matching: the velocity of straight lines from base points to samples."""

import torch
from torch import Tensor

from flowtrain.checks import one_of
from flowtrain.flow import Flow
from flowtrain.objectives.coupling import COUPLINGS
from flowtrain.objectives.matching import Matching
from flowtrain.regularizers import Regularizer


class FlowMatching(Matching):
    """Lines from base points to the samples of a batch, paired as `coupling` says; see `Matching`.

    Args:
        coupling: independent | optimal (minibatch optimal transport, of a conditional flow within each class, whose
            base points would not be standard normal else).

    Raises:
        ConfigError: an unknown coupling, or what `Matching` refuses.
    """

    def __init__(self, flow: Flow, regularizer: Regularizer, coupling: str = "independent") -> None:
        super().__init__(flow, regularizer)
        self.coupling = COUPLINGS[one_of("objective.coupling", coupling, COUPLINGS)]

    def pairs(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        label = self.flow.labels(label, x)
        x1 = self.ends.from_data(x, label)
        x0 = self.ends.from_base(torch.randn_like(x1), label)
        if label is None or self.coupling is COUPLINGS["independent"]:
            return self.coupling(x0, x1), x1, label
        for y in self.flow.seen:
            rows = label == y
            x0[rows] = self.coupling(x0[rows], x1[rows])
        return x0, x1, label
