"""Functions that tests run in other processes. The processes import this module.

`run_all` runs on two ranks of data-parallel training and saves the results of each rank.
"""

import copy
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import Dataset
from flowtrain.ode import SolveOptions
from flowtrain.runs.build import build_data, build_flow, build_objective, build_settings
from flowtrain.training.batches import Batch
from flowtrain.training.trainer import Trainer
from flowtrain.training.update import average_gradients
from flowtrain.utils import ranks
from flowtrain.utils.errors import FlowtrainError, SolverError
from helpers.densities import BANANA

SMALL = ["trainer.batch_size=17", "trainer.val_every=6", "trainer.log_every=1", "data.n_val=21", "data.n_test=20"]
SMALL += ["trainer.steps=12"]
REALNVP = ["model=realnvp", "model.layers=2", "model.hidden=[8]"]
FFJORD = ["model=ffjord", "model.hidden=[8]"]
TIGHT = ["solver.rtol=1e-10", "solver.warmup=0", "solver.control=all"]
# overrides of runs that give the same result on two ranks as in one process, in float64
EQUAL = {
    "realnvp": [*REALNVP, "trainer.clip_norm=0.5", "trainer.ema=0.9"],
    "parts": [*REALNVP, "trainer.accumulate=3"],
    "direct": [*FFJORD, "solver.gradient=direct", *TIGHT],
    "replay": [*FFJORD, "solver.gradient=replay", *TIGHT],
    "fixed": [*FFJORD, "solver=rk4", "solver.steps=4", "trainer.guard_every=5"],
    "plateau": ["model=affine", "trainer.lr_decay=plateau", "trainer.lr_plateau_patience=1", "trainer.lr=1.0"],
}
EQUAL["weighted"] = [*REALNVP, "trainer.accumulate=2"]
IMAGES = ["model.hidden=[4]", "model.scales=1", "trainer.lr=0.01"]
EQUAL |= {"images": ["model=realnvp", *IMAGES], "glow": ["model=glow", "model.steps=2", *IMAGES]}
# flow matching does not use the ActNorm of the pixels. If its parameters had a gradient, weight decay would shrink them
UNUSED = ["model=ffjord", "model.hidden=[4]", "model.scales=0", "objective=flow_matching", "trainer.weight_decay=0.1"]
TARGET = [*REALNVP, "data=target", "objective=reverse_kl", "recipe=none", *BANANA]
POLICIES = ("stop", "skip", "rewind")
# a run on a target with annealed importance sampling every four steps
FORWARD_KL = ["data=target", "target=custom", "target._target_=helpers.densities.far_modes", "target.dim=2"]
FORWARD_KL += ["objective=weighted_forward_kl", *REALNVP, "objective.chains=100", "objective.buffer_min=100"]
FORWARD_KL += ["objective.buffer_size=1000", "objective.updates=4"]


class Images(Dataset):
    """Grey images of real values. Real values get no dequantization noise."""

    event_shape = (1, 4, 4)

    def __init__(self) -> None:
        self.val = self.test = self.train_batch(-1, 21, 0)

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(step + 2)
        return torch.randn(batch_size, 1, 4, 4, generator=generator, dtype=torch.float64).cumsum(-1)


class Weighted(Dataset):
    """Weighted rows, some with the weight 0 and a value whose log p is not finite."""

    event_shape = (2,)

    def __init__(self) -> None:
        self.val = self.test = self.train_batch(-1, 21, 0)
        self.val_weights = self.test_weights = self.weights_share(-1, 21, 0, slice(None))

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(step + 2)
        x = torch.randn(batch_size, 2, generator=generator, dtype=torch.float64)
        if step:
            # the batch of the initialization has ordinary values
            x[self.weights_share(step, batch_size, seed, slice(None)) == 0] = 1e300
        return x

    def weights_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        return (torch.arange(batch_size, dtype=torch.float64) % 4 * (2 / 3))[share]


class Poisoned(Dataset):
    """Data whose batch at one step has a NaN in the last row, which belongs to the second rank.

    Only the first `times` reads of this batch have the NaN.
    """

    event_shape = (2,)

    def __init__(self, bad_step: int, times: int = 9) -> None:
        self.val = self.test = torch.randn(20, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        self.bad_step, self.times = bad_step, times

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        x = torch.randn(batch_size, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        if step == self.bad_step and self.times > 0:
            self.times -= 1
            x[-1, 0] = torch.nan
        return x


def composed(overrides: list[str]) -> dict[str, Any]:
    """Returns a copy of the config that Hydra composes from the overrides. Each config is composed once per process."""
    return copy.deepcopy(_composed(tuple(overrides)))


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    config: dict[str, Any] = compose_defaults(overrides)
    return config


def trainer_of(
    run_dir: Path, overrides: list[str], saved: dict[str, Any] | None = None, data: Dataset | None = None
) -> Trainer:
    """Builds the trainer that `flowtrain` would build, with `data` in place of the configured data if given."""
    config = composed(overrides)
    torch.manual_seed(config["seed"])
    data = data or build_data(config)
    flow = build_flow(config, data.samples)
    return Trainer(build_objective(config, flow, data=data), flow, data, build_settings(config), run_dir, config, saved)


DATA: dict[str, Dataset] = {"images": Images(), "glow": Images(), "weighted": Weighted()}


def trainer(
    run_dir: Path, *overrides: str, data: Dataset | None = None, saved: dict[str, Any] | None = None
) -> Trainer:
    return trainer_of(run_dir, [*SMALL, *overrides], saved, data)


def fit_outcome(run: Trainer) -> dict[str, Any]:
    """Trains, and returns the outcome of the run: error, step, signal, metrics and weights."""
    error = None
    try:
        run.fit()
    except FlowtrainError as e:
        error = (type(e).__name__, str(e))
    ema = {} if run.train_state.ema is None else {f"ema.{k}": v for k, v in run.train_state.ema.shadow.items()}
    return {
        "error": error, "step": run.step, "signal": run.signal, "stopped_by": run.stopped_by, "best": run.best,
        "rows": [{k: v for k, v in row.items() if "seconds" not in k} for row in run.metrics.rows],
        "state": {k: v.clone() for k, v in {**run.flow.state_dict(), **ema}.items()},
    }  # fmt: skip


def run_all(rank: int, size: int, folder: Path) -> None:
    """Runs all checks on one rank. Two processes do all checks, because starting processes is slow."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    logging.getLogger("flowtrain").setLevel(logging.CRITICAL)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    for name, overrides in EQUAL.items():
        found[name] = fit_outcome(trainer(folder / name, *overrides, data=DATA.get(name)))
    for policy in POLICIES:
        data = Poisoned(5, times=1 if rank == 1 and policy == "rewind" else 9)
        keys = [*REALNVP, "trainer.val_every=4", f"trainer.on_nonfinite={policy}"]
        found[policy] = fit_outcome(trainer(folder / policy, *keys, data=data))
    found["unsolved"] = fit_outcome(_trainer_with_failing_solve(folder / "unsolved", rank))
    found["target"] = fit_outcome(trainer(folder / "target", *TARGET))
    found["signal"] = fit_outcome(_trainer_with_signal(folder / "signal", rank))
    keys = [*REALNVP, "model.batch_norm=true", "trainer.on_nonfinite=skip"]
    found["norm"] = fit_outcome(trainer(folder / "norm", *keys, data=Poisoned(5)))
    found["unused"] = fit_with_unused_parameters(folder / "unused")
    found["partly"] = _averaged_partial_gradients(rank)
    run = trainer(folder / "forward_kl", *FORWARD_KL)
    found["forward_kl"] = {**fit_outcome(run), "buffer": run.objective.state()}
    found["annealing"] = fit_outcome(_trainer_with_failing_annealing(folder / "annealing", rank))
    found["collectives"] = [
        str(ranks.gather_errors(SolverError("stiff") if rank == 1 else None)),
        ranks.gather_errors(None), ranks.summed([1.0, rank]), ranks.largest([rank, -rank]),
        ranks.broadcast_object(("of", rank)), ranks.all_gather(rank), [ranks.share(n) for n in (1, 2, 5)],
    ]  # fmt: skip
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def fit_with_unused_parameters(run_dir: Path) -> dict[str, Any]:
    """Trains a run in which some parameters get no gradient. Returns the outcome and the names of these parameters."""
    run = trainer(run_dir, *UNUSED, data=Images())
    begun = {name: p.detach().clone() for name, p in run.flow.named_parameters()}
    found = fit_outcome(run)
    return {**found, "begun": begun, "without": [n for n, p in run.flow.named_parameters() if p.grad is None]}


def _averaged_partial_gradients(rank: int) -> list[list[float] | None]:
    """Returns averaged gradients of parameters with a gradient on one rank, on both ranks and on no rank."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for p in parameters[rank:2]:
        p.grad = torch.full((2,), 4.0)
    average_gradients(parameters, {"loss": torch.tensor(1.0)}, 0.5)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def _trainer_with_failing_solve(run_dir: Path, rank: int) -> Trainer:
    """Builds a trainer whose solve fails on the second rank only, after its backward pass."""
    run = trainer(run_dir, *FFJORD, "solver=rk4", "solver.steps=2")
    take = run.update.backward

    def backward(batch: Batch, options: SolveOptions) -> dict[str, Tensor]:
        terms = take(batch, options)
        if rank == 1 and run.step == 6:
            raise SolverError("the field is too stiff.")
        return terms

    run.update.backward = backward  # type: ignore[method-assign]
    return run


def _trainer_with_failing_annealing(run_dir: Path, rank: int) -> Trainer:
    """Builds a trainer whose annealed importance sampling fails at one step, on the second rank only."""
    run = trainer(run_dir, *FORWARD_KL, "trainer.on_nonfinite=skip")
    annealing: Any = run.objective.annealing
    draw = annealing.draw

    def failing(n: int) -> Any:
        if rank == 1 and run.step == 8:
            raise SolverError("the field is too stiff.")
        return draw(n)

    annealing.draw = failing
    return run


def _trainer_with_signal(run_dir: Path, rank: int) -> Trainer:
    """Builds a trainer that receives a signal on the second rank only."""
    run = trainer(run_dir, "model=affine")
    check_for_stop = run.check_for_stop
    run.check_for_stop = lambda received, out_of_time: check_for_stop(
        15 if rank == 1 and run.step == 7 else received, out_of_time
    )  # type: ignore[method-assign]
    return run
