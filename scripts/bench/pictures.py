"""Measures the time of the pictures of the transport, and of an animation, for a run on two columns.

transport.png and paths.png are drawn as at the end of training, and the animation as by `flowsample RUN animate=true`.
The imports and the reading of the run are not measured. Each picture is drawn once before it is measured.

    python scripts/bench/pictures.py outputs/moons --rounds 3
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import machine, use_threads


def measured(draw: Callable[[], object]) -> tuple[float, float]:
    """Calls a function. Returns its wall time and its CPU time in seconds."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    draw()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--points", type=int, default=1000, help="points of the animation (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="number of threads (default: 1)")
    arguments = parser.parse_args()
    use_threads(arguments.threads)

    from flowtrain.cli.evaluate import OWN
    from flowtrain.cli.load_run import load_run
    from flowtrain.plotting.transport_pictures import animate, draw_transport_pictures

    run = load_run({**OWN, "ckpt": str(arguments.run)}, [])
    flow, data = run.single_flow("a picture", "flowsample {}"), run.build()
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)

        def pictures() -> None:
            draw_transport_pictures(flow, data, lambda name: out / f"{name}.png", "run")

        def animation() -> None:
            animate(flow, data, [out / "animation.gif"], "run", n=arguments.points)

        tasks = {"transport.png and paths.png": pictures, f"animation of {arguments.points:,} points": animation}
        for i in range(arguments.rounds + 1):
            for name, draw in tasks.items():
                taken = measured(draw)
                if i > 0:
                    found.setdefault(name, []).append(taken)
    print(f"{machine()}; threads: {arguments.threads}\n")
    print("| picture | wall (s), least to most | CPU (s), least to most |\n|---|---|---|")
    for name, times in found.items():
        cells = []
        for seconds in zip(*times, strict=True):
            cells.append(f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
