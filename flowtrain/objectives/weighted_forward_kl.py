"""Flow annealed importance sampling bootstrap (FAB): forward divergences of a flow to a target."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowtrain.bijections.regularizers import Regularizer
from flowtrain.data.base import step_generator
from flowtrain.data.targets.base import Target
from flowtrain.flow import Flow, rows_at_a_time
from flowtrain.objectives.ais import Annealing, Drawn
from flowtrain.objectives.base import Objective, weighted_mean
from flowtrain.objectives.replay_buffer import ReplayBuffer, effective_share
from flowtrain.objectives.reverse_kl import check_target, failure_of_target
from flowtrain.ode import AS_CONFIGURED, SolveOptions
from flowtrain.utils import ranks
from flowtrain.utils.arguments import number, whole, within_memory
from flowtrain.utils.errors import CheckpointError, ConfigError, FlowtrainError, NonFiniteError

# the random stream of draws from the buffer
_ROWS = 0x66_61_62
# the smallest accepted share of usable samples of an annealing run
LEAST_USABLE = 0.1
# annealing runs stop with an error after this multiple of the number of runs that `buffer_min` needs if all samples are
# usable
MOST_RUNS = 4


class WeightedForwardKL(Objective):
    """Flow annealed importance sampling bootstrap (FAB; Midgley et al. 2023), with a prioritised replay buffer.

    The objective minimizes the alpha-divergence of a flow q to a target p = p~ / Z. For alpha = 2, this is the integral
    of p^2 / q, which is 1 plus the variance of the weights p / q. The gradient is proportional to
    -E_g[d/dtheta log q(x)], with g = p^alpha q^(1 - alpha) / Z_g. alpha = 1 is the forward KL divergence, with g = p.

    Annealed importance sampling (`Annealing`) starts at q and gives weighted samples of g, which are kept in a replay
    buffer. A training step draws rows of the buffer with probabilities proportional to their weights. The loss is

        -mean_i c_i log q(x_i) with c_i = min((q_old(x_i) / q(x_i))^(alpha - 1), clip),

    in nats. q_old is the flow to which the weight of row i belongs. No gradient flows through the correction c. After
    the step, the weights of the drawn rows are multiplied by their correction without `clip`, so that they belong to
    the flow of this step (Midgley et al. 2023, algorithm 2).

    All ranks have the same buffer. Each rank draws its share of new samples, and uses its share of the rows of a step.

    Args:
        flow: a flow without context.
        regularizer: path regularizers of a continuous flow.
        target: the target.
        batch_size: the number of rows of a step, over all ranks.
        seed: the seed of the run.
        alpha: the order of the divergence, at least 1.
        intermediate, transition, moves, leapfrog, step_size, acceptance: see `Annealing`.
        chains: the number of samples of an annealing run, over all ranks.
        updates: the number of steps between annealing runs.
        buffer_size: the largest number of rows of the buffer. A row has 4 (d + 2) bytes in checkpoints.
        buffer_min: the number of rows at which training begins. Annealing runs are repeated until it is reached.
        clip: the upper limit of the correction c.

    Raises:
        ConfigError: a setting is out of range, or see `flowtrain.objectives.reverse_kl.check_target`.
    """

    uses_target = True

    def __init__(
        self,
        flow: Flow,
        regularizer: Regularizer,
        target: Target,
        batch_size: int,
        seed: int = 0,
        alpha: float = 2.0,
        intermediate: int = 4,
        transition: str = "auto",
        moves: int = 1,
        leapfrog: int = 4,
        step_size: float | None = None,
        acceptance: float | None = None,
        chains: int = 1024,
        updates: int = 8,
        buffer_size: int = 20_000,
        buffer_min: int = 2_000,
        clip: float = 10.0,
    ) -> None:
        super().__init__(flow, regularizer)
        check_target(flow, target, regularizer)
        self.target, self.batch_size, self.seed = target, batch_size, seed
        self.annealing = Annealing(
            flow, target, alpha, intermediate, transition, moves, leapfrog, step_size, acceptance
        )
        self.power = self.annealing.alpha - 1
        self.chains = whole("objective.chains", chains)
        self.updates = whole("objective.updates", updates)
        size = within_memory(
            "objective.buffer_size", whole("objective.buffer_size", buffer_size), 12 * (target.dim + 2)
        )
        self.buffer_min = whole("objective.buffer_min", buffer_min)
        if self.buffer_min > size:
            raise ConfigError(
                f"objective.buffer_min={buffer_min} exceeds objective.buffer_size={buffer_size}; give a smaller number"
            )
        self.clip = number("objective.clip", clip, least=1.0, inclusive=True)
        self.buffer = ReplayBuffer(size, flow.like, target.dim)
        # the effective sample size of the last annealing run, as a share of its samples
        self.ais_ess = torch.tensor(math.nan)
        # the indices of the rows of the step in the buffer, this rank's share of them, and the number of rows of this
        # share that `forward` has used
        self.rows, self.share, self.used = torch.zeros(0, dtype=torch.long), slice(0, 0), 0
        self.x, self.old_log_q = self.buffer.x, self.buffer.log_q
        # (2, batch_size): 1 for rows of the step whose log q this rank has computed, and their new log q
        self.new_log_q: Tensor | None = None

    def begin(self, step: int) -> None:
        """Runs the annealing every `updates` steps, and draws the rows of a step.

        Raises:
            FlowtrainError: the annealing failed on a rank.
        """
        self.settle()
        if step % self.updates == 0 or len(self.buffer) < self.buffer_min:
            self.refresh()
        self.rows = self.buffer.draw(self.batch_size, step_generator(self.seed, _ROWS, step))
        self.share, self.used = ranks.share(self.batch_size), 0
        mine = self.rows[self.share]
        self.x, self.old_log_q = self.buffer.x[mine].to(self.flow.like), self.buffer.log_q[mine]

    def refresh(self) -> None:
        """Adds the samples of an annealing run to the buffer, and repeats this until it has `buffer_min` rows.

        Raises:
            NonFiniteError: too few samples are usable.
        """
        runs = MOST_RUNS * math.ceil(self.buffer_min / self.chains)
        for _ in range(runs):
            self.add_samples()
            if len(self.buffer) >= self.buffer_min:
                return
        raise NonFiniteError(
            f"{runs} annealing runs gave only {len(self.buffer)} usable samples, but objective.buffer_min is "
            f"{self.buffer_min}. {ADVICE}"
        )

    def add_samples(self) -> None:
        """Runs the annealing once, and adds the usable samples of all ranks to the buffer."""
        mine, drawn, failure = ranks.share(self.chains), [], None
        training = self.flow.training
        # In training mode, batch norms would use statistics of the chains, and networks would drop hidden units. A flow
        # with an ODE is in training mode, because evaluation mode controls the error of every row
        self.flow.train(bool(self.flow.ode_blocks))
        try:
            size = rows_at_a_time(self.flow.event_shape)
            for start in range(mine.start, mine.stop, size):
                drawn.append(self.annealing.draw(min(size, mine.stop - start)))
        except FlowtrainError as e:
            failure = e
        finally:
            self.flow.train(training)
        agreed = ranks.gather_errors(failure)
        if agreed is not None:
            raise agreed
        x, log_w, log_q, acceptance = self._gathered(drawn, mine)
        usable = log_w.isfinite()
        found = int(usable.sum())
        if found < LEAST_USABLE * self.chains:
            raise failure_of_target(self.target, x[~usable]) or NonFiniteError(
                f"only {found} of {self.chains} samples of an annealing run have finite densities. {ADVICE}"
            )
        self.annealing.adapt(acceptance)
        self.ais_ess = torch.tensor(effective_share(log_w[usable]))
        self.buffer.add(x[usable], log_w[usable], log_q[usable])

    def _gathered(self, drawn: list[Drawn], mine: slice) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        """Returns x, log_w and log_q of the samples of all ranks, and the mean acceptance rates, (K,)."""
        rates = [
            float(sum(len(part.x) * part.acceptance[k] for part in drawn))
            for k in range(len(self.annealing.step_sizes))
        ]
        rates = [rate / self.chains for rate in ranks.summed(rates)]
        table = self.flow.like.new_zeros(self.chains, self.target.dim + 2)
        start = mine.start
        for part in drawn:
            table[start : start + len(part.x)] = torch.cat([part.x, part.log_w[:, None], part.log_q[:, None]], 1)
            start += len(part.x)
        # each row is nonzero on one rank only
        ranks.sum_in_place(table)
        return table[:, :-2], table[:, -2], table[:, -1], rates

    def rows_to_check(self, x: Tensor) -> Tensor:
        """Returns the first B rows that the last step drew from the buffer, for a batch x of B rows."""
        return self.x[: len(x)]

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        options: SolveOptions = AS_CONFIGURED,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the next B rows of the step, and its terms, for a batch x of B rows.

        The terms are cross_entropy, the loss without penalties; ais_ess, the effective sample size of the last
        annealing run, as a share of its samples; and penalties.
        """
        part = slice(self.used, self.used + len(x))
        self.used = part.stop
        log_q, _, integrals = self.flow.density_pass(self.x[part], None, self.regularizer.options(options))
        with torch.no_grad():
            correction = (self.power * (self.old_log_q[part] - log_q)).clamp(max=math.log(self.clip)).exp()
            self._remember(slice(self.share.start + part.start, self.share.start + part.stop), log_q)
        cross_entropy = -weighted_mean(log_q, correction)
        penalties = {
            name: torch.stack([q[:, i].mean() for q in integrals]).sum()
            for i, name in enumerate(self.regularizer.paths)
        }
        loss, penalties = self.regularized(cross_entropy, penalties)
        return loss, {"cross_entropy": cross_entropy, "ais_ess": self.ais_ess.to(loss), **penalties}

    def _remember(self, part: slice, log_q: Tensor) -> None:
        """Stores log q of rows of the step, by which `settle` corrects their weights."""
        if self.new_log_q is None:
            self.new_log_q = self.flow.like.new_zeros(2, self.batch_size)
        finite = log_q.isfinite()
        self.new_log_q[0, part] = finite.to(log_q)
        self.new_log_q[1, part] = torch.where(finite, log_q, 0.0)

    def settle(self) -> None:
        """Corrects the weights of the rows of the last step for its log q. All ranks must call this method."""
        if not len(self.rows):
            return
        table = self.flow.like.new_zeros(2, self.batch_size) if self.new_log_q is None else self.new_log_q
        ranks.sum_in_place(table)
        known = table[0] > 0
        self.buffer.correct(self.rows[known], table[1, known], self.power)
        self.rows, self.new_log_q = self.rows[:0], None

    def state(self) -> dict[str, Any]:
        self.settle()
        return {
            **self.buffer.state(),
            "step_sizes": self.annealing.step_sizes.clone(),
            "effective": self.ais_ess.item(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise CheckpointError("the checkpoint is damaged: the state of the objective is not a dictionary")
        steps, of_run = state.get("step_sizes"), state.get("effective")
        shape = self.annealing.step_sizes.shape
        if (
            not isinstance(steps, Tensor)
            or steps.dtype != torch.float64
            or not bool((steps.isfinite() & (steps > 0)).all())
        ):
            raise CheckpointError("the checkpoint is damaged: the step sizes of the objective are not positive numbers")
        if steps.shape != shape:
            raise CheckpointError(
                f"the checkpoint has {steps.numel()} step sizes of intermediate distributions, but "
                f"objective.intermediate is {len(self.annealing.step_sizes)}: leave it unchanged"
            )
        if not isinstance(of_run, float) or of_run > 1:
            raise CheckpointError("the checkpoint is damaged: the effective sample size of the objective is not valid")
        self.buffer.load(state)
        self.annealing.step_sizes, self.ais_ess = steps.clone(), torch.tensor(of_run)
        self.rows, self.new_log_q = self.rows[:0], None


ADVICE = "Give the width of the target by target.scale, its support by target.types, or a smaller objective.step_size."
