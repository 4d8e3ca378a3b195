"""The position of a run's schedules: its step, or further if a time limit will end the run before its last step."""

from flowtrain.training.progress import Progress

# share of a phase's time in which only steps count, so that a slow start does not advance the schedules
GRACE = 0.1
# share of a time limit after which the likelihood replaces another objective
MATCHING = 0.5


class Pace:
    """The position of the schedules, in steps: max(step, time spent, converted to steps).

    Learning rate, tolerance and the change to the likelihood follow the position. The time counts after a share GRACE
    of the limit. From there it rises linearly to the last step at the time limit, so that the learning rate has decayed
    by then. Without a time limit, the position is the step. Batches and noise always depend on the step alone.

    A resumed run continues from its position and has the whole time limit again. If the time limit had ended the run,
    it restarts at the position of its step.

    Args:
        progress: the progress of the run, which stores the position.
        steps: the number of steps of the run.
        change: the step at which the likelihood takes over from another objective; 0 if the run begins with it.
    """

    def __init__(self, progress: Progress, steps: int, change: int) -> None:
        self.progress, self.steps, self.change = progress, steps, change
        self.start = (0.0, 0.0)

    def at(self, step: float) -> float:
        """The position of a step."""
        return max(step, self.progress.position)

    def begin(self) -> None:
        """Sets the position at which this command begins to train."""
        p = self.progress
        p.position = float(p.step) if p.position >= self.steps else max(p.position, float(p.step))
        self.start = (0.0, p.position)

    def reached(self, elapsed: float, limit: float | None) -> float:
        """The position after `elapsed` seconds of training. `limit`: seconds of training of this command, or None."""
        p = self.progress
        if limit is None:
            return self.at(p.step)
        matching = p.step < self.change
        end, until = (self.change, MATCHING * limit) if matching else (self.steps, limit)
        since, begin = self.start
        length = until - since
        part = 1.0 if length <= 0 else ((elapsed - since) / length - GRACE) / (1 - GRACE)
        return max(self.at(p.step), begin + (end - begin) * min(1.0, max(0.0, part)))

    def advance(self, position: float, elapsed: float) -> bool:
        """Stores the position that all ranks agreed on. Returns whether the likelihood must begin before its step.

        When the likelihood begins at its step, the rest of the time limit is measured from there.
        """
        p = self.progress
        before, p.position = self.start[1], position
        if p.step < self.change:
            return position >= self.change
        if before < self.change:
            self.start = (elapsed, float(p.step))
            p.position = float(p.step)
        return False

    def change_now(self, elapsed: float) -> None:
        """Makes the likelihood take over at this step."""
        p = self.progress
        self.change, self.start, p.position = p.step, (elapsed, float(p.step)), float(p.step)
