"""Shared functions of the benchmarks: fair timing, spread, Markdown tables, and the name of the machine.

Scripts import this module before torch and jax, because `use_threads` must run first.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# trained weights and data that several runs of a script share
CACHE = Path(__file__).resolve().parents[2] / "outputs" / "bench"


def use_threads(n: int, device: str = "cpu") -> None:
    """Restricts this process to n cores and one kind of device. Call it before importing torch or jax.

    XLA has no setting for the size of its thread pool, which has a thread for every core that the process may use.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-n:])
    os.environ["OMP_NUM_THREADS"] = str(n)
    if n == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    # callbacks run on the CPU even if the rest runs on a GPU
    os.environ["JAX_PLATFORMS"] = "cpu" if device == "cpu" else f"{device},cpu"
    # on a GPU the default is TF32
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    # otherwise jax reserves three quarters of the GPU's memory
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import torch

    torch.set_num_threads(n)


# runs flowtrain with CPU time instead of wall time
IN_CPU_TIME = (
    "import runpy, time; time.perf_counter = time.process_time; runpy.run_module('flowtrain', None, '__main__')"
)


def run_flowtrain(run_dir: Path, *overrides: str, cpu_time: bool = False) -> None:
    """Runs `flowtrain` with the overrides in a new process, with the run directory `run_dir`.

    Args:
        cpu_time: whether the run reports CPU time, summed over threads, instead of wall time.
    """
    program = ["-c", IN_CPU_TIME] if cpu_time else ["-m", "flowtrain"]
    command = [sys.executable, *program, *overrides, f"hydra.run.dir={run_dir}"]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        # flowtrain has printed its own message
        raise SystemExit(f"stopped: {' '.join(command[1:])} failed")


def keep_freed_memory() -> None:
    """Keeps freed memory, as flowtrain's commands do. This speeds up all engines based on torch equally."""
    from flowtrain.utils.process import keep_freed_memory

    keep_freed_memory()


def machine(device: str = "cpu") -> str:
    """Returns the processor, its usable cores and load, the GPU if it is the device, and the versions of packages."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    found = []
    if device == "cuda":
        import torch

        found.append(torch.cuda.get_device_name())
    for name in ("torch", "torchdiffeq", "zuko", "diffrax", "jax"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{cpu}, {cores()} of {os.cpu_count()} cores{load}; {', '.join(found)}"


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_bytes(usage: Any) -> int:
    """Returns the peak resident memory in bytes. `ru_maxrss` is in KiB on Linux and in bytes on macOS."""
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def interleave(cases: Mapping[str, Callable[[], T]], repeats: int, cpu_time: bool = False) -> dict[str, list[float]]:
    """Measures the milliseconds of each case in `repeats` rounds, so that slow moments affect all cases equally.

    Args:
        cases: the functions.
        repeats: the number of rounds.
        cpu_time: whether to measure the CPU time of this process, which other jobs affect less, instead of wall time.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in cases}
    for done in range(repeats):
        for name, case in cases.items():
            begun = clock()
            case()
            times[name].append(1e3 * (clock() - begun))
        progress(f"round {done + 1} of {repeats}")
    return times


def median_and_spread(values: Sequence[float], digits: int = 1) -> tuple[str, str]:
    """Returns the texts ("median", "least to most")."""
    if not values:
        return "-", "-"
    return f"{statistics.median(values):.{digits}f}", f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def progress(words: str) -> None:
    """Prints to stderr, so that stdout contains only the table."""
    print(words, file=sys.stderr, flush=True)


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns the results so far. An incomplete line of a stopped measurement is ignored."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            progress(f"{path}: ignored an incomplete line")
    return found
