"""What the measuring scripts share: fair timing, spread, Markdown tables, and the machine's name.

Imported before torch and jax by every script, because `use_threads` must come first.
"""

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
    """Holds this process, torch and jax alike, to n cores and one kind of device; before torch or jax is imported.

    XLA has no setting for the size of its thread pool: it takes as many as the process may run on.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-n:])
    os.environ["OMP_NUM_THREADS"] = str(n)
    if n == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    # callbacks run on the CPU wherever the rest does
    os.environ["JAX_PLATFORMS"] = "cpu" if device == "cpu" else f"{device},cpu"
    # on a GPU it has TF32 by default
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    # not three quarters of a GPU's memory at once
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import torch

    torch.set_num_threads(n)


def run_flowtrain(run_dir: Path, *overrides: str) -> None:
    """`flowtrain` with these overrides, in a process of its own, into `run_dir`."""
    command = [sys.executable, "-m", "flowtrain", *overrides, f"hydra.run.dir={run_dir}"]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        # its own message is above
        raise SystemExit(f"stopped: {' '.join(command[1:])} failed")


def keep_freed_memory() -> None:
    """As flowtrain's own commands do; every peer on torch gains as much."""
    from flowtrain.utils.process import keep_freed_memory

    keep_freed_memory()


def machine(device: str = "cpu") -> str:
    """The processor, how much of it we hold, the GPU if that is the device, and the versions that matter."""
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
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_bytes(usage: Any) -> int:
    """The largest resident memory of a resource usage, which Linux counts in KiB and macOS in bytes."""
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def interleave(cases: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each case, `repeats` times round the table, so that a slow moment of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for done in range(repeats):
        for name, case in cases.items():
            begun = time.perf_counter()
            case()
            times[name].append(1e3 * (time.perf_counter() - begun))
        progress(f"round {done + 1} of {repeats}")
    return times


def median_and_spread(values: Sequence[float], digits: int = 1) -> tuple[str, str]:
    """("median", "least to most") in words."""
    if not values:
        return "-", "-"
    return f"{statistics.median(values):.{digits}f}", f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for the terminal."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def progress(words: str) -> None:
    """To standard error, so that standard output is the table alone."""
    print(words, file=sys.stderr, flush=True)
