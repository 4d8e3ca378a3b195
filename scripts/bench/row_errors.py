"""Coverage of the errors of rows, and cost of separate steps for each row against steps that a batch shares.

    python scripts/bench/row_errors.py outputs/moons outputs/gas --rows 2000
    python scripts/bench/row_errors.py outputs/gas --scoring DIR/gas/train.csv DIR/gas/val.csv DIR/gas/test.csv

For rows of the test set of each run, the first table shows how often the error of `Flow.log_prob(x, with_error=True)`
covers the difference from a solve in float64 at rtol 1e-10 with the same probes. If the trace is estimated, the errors
are those without the noise of the probes. The second table compares separate steps with shared steps at several
tolerances: NFE, seconds, and the largest difference from the accurate solve.

With `--scoring FILES`, all rows of the files are scored as by floweval, with the solver of the run. Each round scores
them with separate and with shared steps. The table shows the medians over rounds of the CPU seconds and of their ratio.
CPU seconds do not include the time in which other processes use the core.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import keep_freed_memory, machine, progress, table
from torch import Tensor

import flowtrain
from flowtrain.bijections.continuous import Continuous
from flowtrain.evaluation.log_likelihood import held_out, nfe_of_pass, score_rows
from flowtrain.flow import Flow, rows_at_a_time
from flowtrain.ode import record_solves
from flowtrain.runs.build import build_data
from flowtrain.utils.process import seeded
from flowtrain.utils.row_noise import rows_from

ACCURATE = 1e-10
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
COVERAGE = ("run", "rtol", "covered", "median error", "median stated", "worst error", "worst stated")
SCORING = ("run", "rows", "rtol", "CPU seconds", "shared", "shared / separate", "least to most")
COST = ("run", "rtol", "NFE", "shared", "seconds", "shared", "worst error", "shared")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories of ffjord")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--accurate", type=float, default=ACCURATE, help="rtol of the accurate solve")
    parser.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES)
    parser.add_argument("--n-test", type=int, help="replaces data.n_test of the runs, for images")
    parser.add_argument("--coverage-only", action="store_true")
    parser.add_argument("--scoring", nargs="+", metavar="CSV", help="instead: the time of scoring the rows of files")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of --scoring")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


@contextmanager
def shared_steps() -> Iterator[None]:
    """Lets the rows of a batch share the steps."""
    problem: Callable[..., Any] = Continuous._problem
    with patch.object(Continuous, "_problem", lambda *given: replace(problem(*given), rows=None)):
        yield


@torch.no_grad()
def scored(flow: Flow, x: Tensor, context: Tensor | None, rtol: float) -> tuple[Tensor, Tensor, float, float]:
    """Returns log p and the errors of rows, (n,), float64, the NFE and the seconds."""
    flow = flow.with_solvers(lambda solver: solver.replace(rtol=rtol, atol=rtol, max_nfe=1_000_000))
    size, found = rows_at_a_time(flow.event_shape), []
    begun = time.perf_counter()
    with record_solves() as solves:
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            with rows_from(start), seeded(0, x.device):
                one, error = flow.density_pass_with_error(x[part], None if context is None else context[part])
                found.append(torch.stack([one.log_p, error]).double())
    log_p, error = torch.cat(found, 1)
    return log_p, error, nfe_of_pass(flow, solves) or 0.0, time.perf_counter() - begun


def of_scoring(path: str, files: list[str], rounds: int) -> list[str]:
    """Returns the row of the table SCORING for a run."""
    flow = flowtrain.load(path).eval()
    assert isinstance(flow, Flow)
    assert flow.solver is not None
    rows = np.concatenate([np.loadtxt(file, delimiter=",", skiprows=1, dtype=np.float32) for file in files])
    x = torch.from_numpy(rows)

    times = []
    for done in range(rounds):
        begun = time.process_time()
        score_rows(flow, x)
        middle = time.process_time()
        with shared_steps():
            score_rows(flow, x)
        times.append((middle - begun, time.process_time() - middle))
        progress(f"round {done + 1} of {rounds}")
    ratios = [b / a for a, b in times]
    seconds = [f"{statistics.median(one):.1f}" for one in zip(*times, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return [path, str(len(x)), f"{flow.solver.rtol:g}", *seconds, f"{statistics.median(ratios):.2f}", spread]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.scoring:
        rows = [of_scoring(path, args.scoring, args.rounds) for path in args.runs]
        print(machine())
        print(table(SCORING, rows))
        return
    coverage: list[list[str]] = []
    cost: list[list[str]] = []
    for path in args.runs:
        flow = flowtrain.load(path).eval()
        assert isinstance(flow, Flow)
        assert flow.record is not None
        config = copy.deepcopy(flow.record.config)
        if args.n_test:
            config["data"]["n_test"] = args.n_test
        x, context = held_out(flow, build_data(config), "test")
        x, context = x[: args.rows], None if context is None else context[: args.rows]
        with seeded(0, x.device):
            x = flow.dequantized(x)
        exact = copy.deepcopy(flow).double()
        true = scored(exact, x.double(), context, args.accurate)[0]
        for rtol in args.tolerances:
            log_p, stated, nfe, seconds = scored(flow, x, context, rtol)
            error = (log_p - true).abs()
            share = float((error <= stated).double().mean())
            numbers = (error.median(), stated.median(), error.max(), stated.max())
            coverage.append([path, f"{rtol:g}", f"{100 * share:.1f}%", *(f"{float(v):.1e}" for v in numbers)])
            if args.coverage_only:
                continue
            with shared_steps():
                other, _, shared_nfe, shared_seconds = scored(flow, x, context, rtol)
            worst = float((other - true).abs().max())
            both = (nfe, shared_nfe), (seconds, shared_seconds), (float(error.max()), worst)
            forms = (".0f", ".1f", ".1e")
            cells = [format(v, form) for pair, form in zip(both, forms, strict=True) for v in pair]
            cost.append([path, f"{rtol:g}", *cells])
    print(machine())
    print(table(COVERAGE, coverage))
    if cost:
        print(table(COST, cost))


if __name__ == "__main__":
    main()
