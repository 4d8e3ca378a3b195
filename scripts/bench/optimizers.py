"""CPU seconds of training until the KL of FFJORD on moons is below 0.05, 0.02 and 0.01 nats, for several optimizers.

    python scripts/bench/optimizers.py
    python scripts/bench/optimizers.py --only "Muon, 300 steps" --seeds 5

Adam and Muon are flowtrain's. SOAP (Vyas et al. 2024) and schedule-free Adam (Defazio et al. 2024) are from the package
pytorch-optimizer: `pip install pytorch-optimizer`.

Each step is a step of flowtrain's trainer, with its batches, tolerance, clipping, learning rate, average of the weights
and solver guard. SOAP and schedule-free Adam replace only the optimizer. Schedule-free Adam has a constant learning
rate after the warm-up, and its own average of the weights instead of the trainer's. Validations compute the KL, which
is the mean of log p_true - log p_model, on the validation set. The seconds do not include validations. The last column
is the KL on the test set after the last step. The script runs on one thread and prints medians over the seeds.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common

common.use_threads(1)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from flowtrain.cli.config_files import compose_defaults  # noqa: E402
from flowtrain.evaluation.log_likelihood import log_probs  # noqa: E402
from flowtrain.runs.build import build_data, build_flow, build_objective  # noqa: E402
from flowtrain.training import initialization  # noqa: E402
from flowtrain.training.batches import Batches  # noqa: E402
from flowtrain.training.progress import Progress  # noqa: E402
from flowtrain.training.schedules import ScheduleClock  # noqa: E402
from flowtrain.training.settings import Settings  # noqa: E402
from flowtrain.training.train_state import TrainState  # noqa: E402
from flowtrain.training.update import Update  # noqa: E402

GAPS = (0.05, 0.02, 0.01)


@dataclass(frozen=True)
class Case:
    """Overrides of flowtrain's config, and the optimizer of another package, or None for flowtrain's optimizer."""

    overrides: Sequence[str]
    peer: Callable[[Sequence[torch.nn.Parameter], float], Any] | None = None


def soap(parameters: Sequence[torch.nn.Parameter], lr: float) -> Any:
    from pytorch_optimizer import SOAP

    return SOAP(parameters, lr=lr, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=10)


def schedule_free(parameters: Sequence[torch.nn.Parameter], lr: float) -> Any:
    from pytorch_optimizer import ScheduleFreeAdamW

    return ScheduleFreeAdamW(parameters, lr=lr, betas=(0.9, 0.99))


def with_steps(steps: int, lr: float, *more: str) -> list[str]:
    return [f"trainer.steps={steps}", f"trainer.lr={lr}", *more]


CASES = {
    "Adam": Case(with_steps(400, 0.015, "trainer.optimizer=adam")),
    "schedule-free Adam, beta2 0.99": Case(
        with_steps(400, 0.015, "trainer.lr_decay=constant", "trainer.ema=null"), schedule_free
    ),
    "SOAP, beta2 0.95, eigenvectors every 10 steps": Case(with_steps(400, 0.015), soap),
    "SOAP, lr 0.03, 300 steps": Case(with_steps(300, 0.03), soap),
    "Muon": Case(with_steps(400, 0.015, "trainer.optimizer=muon")),
    "Muon, 300 steps": Case(with_steps(300, 0.015, "trainer.optimizer=muon")),
}


@dataclass(frozen=True)
class Run:
    """The validations (seconds, KL), the seconds of the whole training, and the KL on the test set."""

    validations: list[tuple[float, float]]
    seconds: float
    kl: float

    def reached(self, gap: float) -> float | None:
        """Returns the seconds of the first validation below `gap`, or None."""
        return next((seconds for seconds, kl in self.validations if kl < gap), None)


def train(case: Case, seed: int, every: int) -> Run:
    config = compose_defaults(["data=moons", f"seed={seed}", "solver.train_rtol=1e-4", *case.overrides])
    torch.manual_seed(seed)
    data = build_data(config)
    flow = build_flow(config, data.samples)
    objective, settings = build_objective(config, flow), Settings(**config["trainer"])
    batches = Batches(flow, data, settings.batch_size, seed)
    initialization.initialize(flow, batches)
    state = TrainState(objective, flow, settings, ScheduleClock(Progress(), settings.steps, 0))
    optimizer: Any = state.optimizer
    if case.peer is not None:
        optimizer = case.peer(list(flow.parameters()), settings.lr)
        # the trainer calls `update`
        optimizer.update = optimizer.step
        state.optimizer = optimizer
    update = Update(objective, state, batches, settings, None)

    def kl(x: Tensor) -> float:
        """Returns the KL on rows x of the weights that a validation uses."""
        scored = copy.deepcopy(flow).eval()
        found = data.log_prob(x)
        assert found is not None
        return float((found - log_probs(scored, x)).mean())

    def validated(x: Tensor) -> float:
        if case.peer is schedule_free:
            optimizer.eval()
        found: float = state.with_average(kl, x)
        if case.peer is schedule_free:
            optimizer.train()
        return found

    validations, seconds = [], 0.0
    for step in range(settings.steps):
        begun = time.process_time()
        _, batch = update.take(step, state.rate(step))
        state.check_solver(step, batch)
        seconds += time.process_time() - begun
        if (step + 1) % every == 0:
            validations.append((seconds, validated(data.val)))
    return Run(validations, seconds, validated(data.test))


def row(name: str, runs: Sequence[Run]) -> list[str]:
    """Returns a row of the table. If a run does not reach a gap, its seconds are infinite for the median."""
    cells = []
    for gap in GAPS:
        found = statistics.median_low([run.reached(gap) or float("inf") for run in runs])
        cells.append("-" if found == float("inf") else f"{found:.1f}")
    whole, kl = (statistics.median(getattr(run, key) for run in runs) for key in ("seconds", "kl"))
    return [name, *cells, f"{whole:.1f}", f"{kl:.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=25, help="steps between validations")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="rows of the table")
    args = parser.parse_args()
    runs: dict[str, list[Run]] = {name: [] for name in args.only}
    # the optimizers alternate, so that slow moments of the machine affect all of them
    for seed in range(args.seeds):
        for name in args.only:
            runs[name].append(train(CASES[name], seed, args.every))
            common.progress(f"seed {seed}, {name}: {runs[name][-1].seconds:.1f} s, KL {runs[name][-1].kl:.4f}")
    print(common.machine())
    print()
    head = ["optimizer", *(f"KL < {gap:g}" for gap in GAPS), "whole run", "KL at its end"]
    print(common.table(head, [row(name, found) for name, found in runs.items()]))


if __name__ == "__main__":
    main()
