"""Compares flowtrain's single collective per step with DistributedDataParallel, on two ranks of this machine (Gloo).

    python scripts/bench/averaging.py
    python scripts/bench/averaging.py --steps 40 --threads 1

Both use the same loss and batch. For each setup the script prints the median time of forward, backward and averaging,
with alternating steps in the same processes, and the difference of the two gradients. DDP overlaps its all-reduce with
the backward pass. flowtrain sums everything after it, see flowtrain.training.update.average_gradients.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from common import machine, median_and_spread, table
from torch.nn.parallel import DistributedDataParallel

from flowtrain.cli.config_files import compose_defaults
from flowtrain.runs.build import build_data, build_flow, build_objective
from flowtrain.training.update import average_gradients

SETUPS = {
    "FFJORD, moons, 256 rows per rank": (["model=ffjord", "data=moons", "solver.rtol=1e-4"], 256),
    "RealNVP, MNIST, 16 images per rank": (["model=realnvp", "data=mnist"], 16),
    "Glow, MNIST, 16 images per rank": (["model=glow", "data=mnist", "model.coupling=affine"], 16),
}
WARM = 3


def work(rank: int, folder: str, steps: int, threads: int) -> None:
    """Measures every setup on one of two ranks. Rank 0 writes the results."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: setup(rank, overrides, rows, steps) for name, (overrides, rows) in SETUPS.items()}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def setup(rank: int, overrides: list[str], rows: int, steps: int) -> tuple[list[float], list[float], int, float]:
    """Returns step times of flowtrain and of DDP, the number of parameters, and the largest difference of gradients."""
    config = compose_defaults(overrides)
    torch.manual_seed(0)
    data = build_data(config)
    flow = build_flow(config, data.samples)
    objective = build_objective(config, flow)
    flow.bijection.initialize(flow.dequantized(data.train_batch(0, 500, 0)))
    with warnings.catch_warnings():
        # newer versions of torch warn about a renamed function
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = DistributedDataParallel(objective, broadcast_buffers=False)
    parameters = list(flow.parameters())

    def ours(x: torch.Tensor) -> None:
        loss, terms = objective(x)
        loss.backward()
        average_gradients(parameters, {"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}}, 0.5)

    def theirs(x: torch.Tensor) -> None:
        wrapped(x)[0].backward()

    times: dict[Callable[[torch.Tensor], None], list[float]] = {ours: [], theirs: []}
    apart = 0.0
    for step in range(WARM + steps):
        x = data.train_batch(step, 2 * rows, 0)[rank * rows : (rank + 1) * rows]
        gradients = []
        for act, taken in times.items():
            flow.zero_grad()
            torch.manual_seed(step)
            dist.barrier()
            begun = time.perf_counter()
            act(x)
            taken.append(time.perf_counter() - begun)
            gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        apart = max(apart, float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()))
    return times[ours][WARM:], times[theirs][WARM:], sum(p.numel() for p in parameters), apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=work, args=(r, folder, args.steps, args.threads)) for r in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("stopped: a rank failed with the message above")
        found = torch.load(Path(folder, "found.pt"), weights_only=True)
    print(f"{machine()}\n")
    rows = []
    for name, (ours, theirs, size, apart) in found.items():
        cells = (f"{median_and_spread([1e3 * t for t in each])[0]} ms" for each in (ours, theirs))
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        rows.append([name, f"{4 * size / 1e6:.2f} MB", *cells, f"{ratio:.2f}", f"{apart:.0e}"])
    print(table(("", "gradient", "flowtrain", "DDP", "DDP / flowtrain", "gradients apart"), rows))


if __name__ == "__main__":
    main()
