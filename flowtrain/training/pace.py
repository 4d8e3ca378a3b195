"""How far the schedules of a run are: by its steps, or by its time where a time limit ends it earlier."""

from flowtrain.training.progress import Progress

# of the time of a phase, the share in which only steps count: a slow start must not hurry a run that ends in time
GRACE = 0.1
# of a time limit, the share after which another objective gives way to the likelihood
MATCHING = 0.5


class Pace:
    """The position of the schedules, in steps: max(step, what of the time limit is spent, as a number of steps).

    Learning rate, tolerance and the change to the likelihood go by it. After a share GRACE of the time, the second of
    the two rises linearly to the last step at the time limit, so that the learning rate has come down by then. Without
    a time limit the position is the step. With one, batches and noise still depend on the step alone.

    A run that was interrupted goes on from its position, and has the whole limit of the new command for the rest. A run
    that its time limit had ended begins again at the position of its step.

    Args:
        progress: of the run, which keeps the position.
        steps: of the run.
        change: the step at which the likelihood takes over from another objective; 0 where it comes first.
    """

    def __init__(self, progress: Progress, steps: int, change: int) -> None:
        self.progress, self.steps, self.change = progress, steps, change
        self.start = (0.0, 0.0)

    def at(self, step: float) -> float:
        """The position of a step."""
        return max(step, self.progress.position)

    def begin(self) -> None:
        """Begins the time of a command."""
        p = self.progress
        p.position = float(p.step) if p.position >= self.steps else max(p.position, float(p.step))
        self.start = (0.0, p.position)

    def reached(self, elapsed: float, limit: float | None) -> float:
        """The position after `elapsed` seconds of a command that has `limit` seconds for training, or None."""
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
        """Takes over the position that all ranks agreed on; whether the likelihood must take over before its step.

        Where the likelihood begins, by its step or by time, its own share of the time begins as well.
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
        """The likelihood takes over at this step."""
        p = self.progress
        self.change, self.start, p.position = p.step, (elapsed, float(p.step)), float(p.step)
