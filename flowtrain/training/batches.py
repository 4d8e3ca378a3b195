"""Training batches. A batch is a pure function of the seed and the step, and each rank draws its share of the rows."""

from typing import NamedTuple

from torch import Tensor

from flowtrain.data.base import STEP_STREAM, Dataset, step_generator
from flowtrain.flow import Flow
from flowtrain.utils import ranks


class Batch(NamedTuple):
    """This rank's rows of a training batch.

    Attributes:
        x: samples (rows, *event_shape) on the flow's device.
        label: labels (rows,) for a conditional flow, else None.
        seed: seed of all noise that the step draws.
    """

    x: Tensor
    label: Tensor | None
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

    def of(self, step: int) -> Batch:
        """Returns this rank's rows of the batch of a step."""
        return Batch(*self.draw(step, self.size, self.share), self.seed_of(step))

    def draw(self, step: int, size: int, share: slice) -> tuple[Tensor, Tensor | None]:
        """Returns the rows in the slice `share` of a batch of `size` rows, and their labels for a conditional flow."""
        x = self.data.train_share(step, size, self.seed, share).to(self.device, non_blocking=True)
        label = self.data.labels_share(step, size, self.seed, share) if self.flow.classes is not None else None
        return x, None if label is None else label.to(self.device, non_blocking=True)
