"""Checks that no default loses to a Gaussian on small tables: generated tables of 20 to 2,000 rows, 1 to 50 columns.

    python scripts/small_tables.py                                 # every model on every table
    python scripts/small_tables.py --models realnvp --rows 20 150  # some of them
    python scripts/small_tables.py --seeds 3 --jobs 2

Each row is a run of `flowtrain model=MODEL data=array` with no other argument. The flow is scored on 10,000 new rows of
the same distribution, and so is a Gaussian with the shrunk covariance of the training rows (`shrunk_covariance`).
`excess` is the mean NLL of the flow minus the mean NLL of the Gaussian, in nats, with the standard error over the new
rows. The script fails if an excess is above 0.5 nats plus three standard errors. Tables have at least four rows for
each column.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

KINDS = ("gaussian", "correlated", "bimodal", "heavy")
MODELS = ("affine", "realnvp", "glow", "nsf", "maf", "ffjord")
ROWS = (20, 50, 150, 500, 2000)
COLUMNS = (1, 2, 5, 12, 35, 50)
FRESH = 10_000
# the allowed excess over the Gaussian in nats, plus this many standard errors
LEEWAY, ERRORS = 0.5, 3.0


class Result(NamedTuple):
    """One run: NLL of new rows in nats under the Gaussian and under the flow, and their difference with its error."""

    model: str
    kind: str
    rows: int
    columns: int
    seed: int
    gaussian: float
    flow: float
    excess: float
    error: float
    step: int
    seconds: float

    @property
    def fails(self) -> bool:
        """Whether the flow exceeds the allowed excess, or has a NaN."""
        return not self.excess <= LEEWAY + ERRORS * self.error


def generated(kind: str, rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Generates a table (rows, columns), and FRESH more rows of the same distribution, float32.

    The kinds are

    - gaussian: N(0, I)
    - correlated: N(0, A A^T) with a random matrix A
    - bimodal: two unit Gaussians whose means are 6 apart
    - heavy: Student-t with four degrees of freedom and the correlations of `correlated`
    """
    g = torch.Generator().manual_seed(1000 * seed + columns)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=g) / math.sqrt(columns)
    direction = torch.randn(columns, generator=g)
    g.manual_seed(1_000_000 + 1000 * seed + rows)
    n = rows + FRESH
    z = torch.randn(n, columns, generator=g)
    if kind == "bimodal":
        side = 2 * torch.randint(0, 2, (n, 1), generator=g) - 1
        z = z + 3 * side * direction / direction.norm()
    elif kind == "correlated":
        z = z @ mixing.T
    elif kind == "heavy":
        chi2 = torch.randn(n, 4, generator=g).square().sum(1, keepdim=True)
        z = (z @ mixing.T) * (4 / chi2).sqrt()
    return z[:rows], z[rows:]


def measure(model: str, kind: str, rows: int, columns: int, seed: int, *overrides: str) -> Result:
    """Trains the default of a model on a generated table, and scores new rows under the flow and the Gaussian."""
    # only the process that trains imports torch and hydra
    import flowtrain
    from flowtrain.bijections.linear import gaussian_log_prob, shrunk_covariance
    from flowtrain.cli.config_files import compose_defaults
    from flowtrain.data.tables.array import ArrayData
    from flowtrain.runs.run import train

    table, fresh = generated(kind, rows, columns, seed)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path, run_dir = Path(folder) / "table.npy", Path(folder) / "run"
        np.save(path, table.numpy())
        run_dir.mkdir()
        config = compose_defaults(
            [f"model={model}", "data=array", f"data.path={path}", f"seed={seed}", "threads=1", *overrides]
        )
        config.pop("trust", None)
        with contextlib.redirect_stderr(io.StringIO()):
            train(config, run_dir)
        flow = flowtrain.load(run_dir)
        data = ArrayData(**{k: v for k, v in config["data"].items() if k not in ("name", "_target_")})
        training = data.train_share(0, data.n_train or 0, 0, slice(None))
        step = json.loads((run_dir / "result.json").read_text())["step"]
    gaussian = -gaussian_log_prob(fresh, *shrunk_covariance(training))
    with torch.no_grad():
        nll = -torch.cat([flow.log_prob(part) for part in fresh.split(2000)]).double()
    difference = nll - gaussian
    return Result(
        model,
        kind,
        rows,
        columns,
        seed,
        gaussian.mean().item(),
        nll.mean().item(),
        difference.mean().item(),
        difference.std().item() / math.sqrt(FRESH),
        step,
        time.perf_counter() - begun,
    )


def cases(args: argparse.Namespace) -> list[tuple[str, str, int, int, int]]:
    """Returns (model, kind, rows, columns, seed) of every run, short runs first."""
    every = itertools.product(args.rows, args.columns, args.seeds, args.kinds, args.models)
    couplings = ("realnvp", "glow")
    return [(m, k, n, d, s) for n, d, s, k, m in every if n >= 4 * d and not (d == 1 and m in couplings)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--columns", nargs="+", type=int, default=COLUMNS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="number of simultaneous runs, each with one thread")
    return parser.parse_args()


def main() -> None:
    from common import machine, progress, table

    args = arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for result in pool.map(measure, *zip(*cases(args), strict=True)):
            found.append(result)
            progress(" ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in result) + " FAILS" * result.fails)
    rows = [
        [
            *(str(v) for v in r[:5]),
            f"{r.gaussian:.3f}",
            f"{r.flow:.3f}",
            f"{r.excess:.3f} ± {r.error:.3f}{' FAILS' * r.fails}",
            str(r.step),
            f"{r.seconds:.1f}",
        ]
        for r in found
    ]
    head = ("model", "kind", "rows", "columns", "seed", "Gaussian", "flow", "excess", "best step", "seconds")
    print(machine(), "", table(head, rows), sep="\n")
    bad = sum(r.fails for r in found)
    print(f"\n{bad} of {len(found)} runs fail")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
