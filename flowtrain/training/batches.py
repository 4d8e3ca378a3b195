"""Training batches. A batch is a pure function of the seed and the step, and each rank draws its share of the rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.data.base import STEP_STREAM, Dataset, step_generator
from flowtrain.flow import Flow
from flowtrain.utils import ranks


class Batch(NamedTuple):
    """This rank's rows of a training batch.

    Attributes:
        x: samples (rows, *event_shape) on the flow's device.
        context: for a conditional flow, values (rows, k) of context columns or labels (rows,), else None.
        weights: weights (rows,), or None.
        seed: seed of all noise that the step draws.
    """

    x: Tensor
    context: Tensor | None
    weights: Tensor | None
    seed: int


class Batches:
    """Draws the training batches of `data` for `flow`.

    Args:
        size: the number of rows of a batch, over all ranks.
        seed: the seed of the run.

    Attributes:
        share: this rank's rows of a batch.
        weight: `share` as a fraction of the batch.
    """

    def __init__(self, flow: Flow, data: Dataset, size: int, seed: int) -> None:
        self.flow, self.data, self.size, self.seed = flow, data, size, seed
        self.device = flow.like.device
        data.to(self.device)
        self.share = ranks.share(size)
        self.weight = (self.share.stop - self.share.start) / size

    def seed_of(self, step: int) -> int:
        """Returns the seed of the noise of a step, different on each rank."""
        own = (ranks.rank(),) if ranks.rank() else ()
        return step_generator(self.seed, STEP_STREAM, step, *own).initial_seed()

    def of(self, step: int, seed: int | None = None) -> Batch:
        """Returns this rank's rows of the batch of a step.

        Args:
            seed: `seed_of(step)`. None: it is computed.
        """
        return Batch(*self.draw(step, self.size, self.share), self.seed_of(step) if seed is None else seed)

    def draw(self, step: int, size: int, share: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the rows in the slice `share` of a batch of `size` rows, their context and their weights.

        Rows of weight 0 are replaced by another row of the slice.
        """
        x = self.data.train_share(step, size, self.seed, share).to(self.device, non_blocking=True)
        context = None
        if self.flow.context:
            context = self.data.context_share(step, size, self.seed, share)
        elif self.flow.classes is not None:
            context = self.data.labels_share(step, size, self.seed, share)
        weights = self.data.weights_share(step, size, self.seed, share)
        context, weights = (None if v is None else v.to(self.device, non_blocking=True) for v in (context, weights))
        if weights is not None:
            rows = _stand_ins(weights)
            x, context = x[rows], None if context is None else context[rows]
        return x, context, weights


def _stand_ins(weights: Tensor) -> Tensor:
    """Returns the position of each row. Rows of weight 0 get the position of a row with another weight instead.

    A row of weight 0 may have a loss or a gradient that is not finite, and 0 times such a value is NaN.
    """
    has_weight = weights != 0
    positions = torch.arange(len(weights), device=weights.device)
    return torch.where(has_weight, positions, has_weight.to(torch.uint8).argmax())
