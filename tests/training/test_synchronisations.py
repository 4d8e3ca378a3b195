"""A training step reads as few values from the device as possible, because each read waits for a GPU."""

from typing import Any

import pytest
import torch
from helpers import MakeTrainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowtrain.ode import Problem

# operations whose result the host needs: values, or a shape that depends on values
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal", "repeat_interleave")
COPIES = ("tolist", "numpy", "cpu")


class CountReads(TorchDispatchMode):
    """Counts the operations of READS, and indexing with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in READS or masks:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


class CountCopies(TorchFunctionMode):
    """Counts the methods of COPIES, which a dispatch mode does not see on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in COPIES:
            self.reads.append(func.__name__)
        return func(*args, **(kwargs or {}))


FFJORD = ["model=ffjord", "model.hidden=[8]"]


@pytest.mark.parametrize(
    ("overrides", "of_update", "of_solver_step", "of_solve"),
    [
        (FFJORD, 1, 1, 0),
        ([*FFJORD, "model.trace=hutchinson", "regularizer=rnode"], 1, 1, 0),
        ([*FFJORD, "solver.cuda_graphs=true"], 1, 0, 1),
        ([*FFJORD, "solver=rk4", "solver.steps=4"], 1, 0, 1),
        ([*FFJORD, "objective=flow_matching"], 1, 0, 0),
        (["model=nsf", "model.layers=2", "model.hidden=[8]"], 1, 0, 0),
        (["model=maf", "model.layers=2", "model.hidden=[8]"], 1, 0, 0),
        (["model=realnvp", "model.layers=2", "model.hidden=[8]"], 1, 0, 0),
        (["model=glow", "model.steps=2", "model.hidden=[8]"], 1, 0, 0),
    ],
)
def test_step_reads_few_values(
    overrides: list[str],
    of_update: int,
    of_solver_step: int,
    of_solve: int,
    trainer_of: MakeTrainer,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # this check reads a tensor on the host, on any device
    monkeypatch.setattr(Problem, "has_duration", lambda problem: True)
    trainer = trainer_of(tmp_path, [*overrides, "trainer.batch_size=16", "trainer.guard_every=null"])
    for _ in range(4):
        with CountReads() as reads, CountCopies() as copies:
            row = trainer.train_step()
        trainer.progress.step += 1
    steps = 0 if row["nfe_forward"] is None else (row["nfe_forward"] - 1) // 6
    found = reads.reads + copies.reads
    assert len(found) == of_update + of_solve + of_solver_step * steps, found
