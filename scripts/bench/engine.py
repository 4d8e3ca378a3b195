"""One FFJORD training step by flowtrain and by other engines, with the same field, weights, batch, tolerance and trace.

    python scripts/bench/engine.py                               # two moons: d = 2, batch 512, one thread
    python scripts/bench/engine.py --d 43                        # a mixture of Gaussians, Hutchinson's trace
    python scripts/bench/engine.py --ckpt outputs/my-run --batch 2000 --rtol 1e-6
    python scripts/bench/engine.py --device cuda --threads 4 --only flowtrain torchdiffeq

A step is the solve from x to z, the NLL and its gradient with respect to all parameters, without the optimizer. The
script prints a Markdown table for each of three sets of weights: initial weights (the last layer is zero), initial
weights with a random last layer, and trained weights (of --ckpt, or of a short run kept in outputs/bench).

All engines take turns in rounds. Times are medians over rounds. Ratios are to flowtrain's default in the same round.
NFE counts evaluations of the velocity. Errors of the gradient (relative, all parameters as one vector) and of the NLL
(nats) are measured against float64 at rtol 1e-10.

Compare ratios only together with the errors:

- In training, flowtrain excludes the log-determinant from the step control unless control=all. All other engines
  include it, so compare them with control=all.
- flowtrain's NFE does not count the batched evaluation of the trace at its nodes.
- All engines have the same field, although zuko's own CNF has another network.
- zuko controls the largest error, and others control the RMS. zuko weights the error of the log-determinant by 1/100.
- diffrax is jitted, and compile time is not counted.

zuko and diffrax are measured if they are installed (pip install zuko diffrax). All engines, including jax, are
restricted to --threads cores.
"""

import argparse
import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common import CACHE, keep_freed_memory, machine, progress, run_flowtrain, use_threads

if TYPE_CHECKING:
    from steps import Contestant, Problem

    from flowtrain.bijections.base import Bijection

MODES = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, help="a run directory or .pt file of model=ffjord; default: train one")
    parser.add_argument("--d", type=int, default=2, help="2: moons, exact trace; others: a mixture, Hutchinson's trace")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rtol", type=float, default=1e-5, help="relative and absolute tolerance")
    parser.add_argument("--method", default="dopri5", help="solver of flowtrain and torchdiffeq")
    parser.add_argument("--train", nargs="*", default=[], help="overrides for the run that trains the weights")
    stages = ("initial", "random", "trained")
    parser.add_argument("--weights", nargs="+", choices=stages, default=stages)
    parser.add_argument("--only", nargs="+", default=[""], help="engines whose name contains one of these words")
    return parser.parse_args()


def trained_run(d: int, overrides: list[str]) -> Path:
    """Trains a run with Adam and the overrides, or returns the run of an earlier call."""
    name = re.sub(r"[^\w.-]", "_", "-".join([f"d{d}", *overrides]))
    run_dir = CACHE / name
    if (run_dir / "result.json").exists():
        return run_dir
    # the settings of the figures in README.md
    data = ["data=moons", "trainer.optimizer=adam", "trainer.lr=0.015", "trainer.batch_size=512", "trainer.steps=600"]
    if d != 2:
        data = ["data=array", f"data.path={mixture(d)}", "trainer.steps=300", "trainer.lr=0.002"]
    progress(f"training a run in {run_dir}: flowtrain {' '.join(data + overrides)}")
    run_flowtrain(run_dir, *data, *overrides)
    return run_dir


def mixture(d: int, n: int = 20_000) -> Path:
    """Writes a file of n draws from a mixture of Gaussians with random centers and covariances."""
    import numpy as np

    path = CACHE / f"mixture{d}.npy"
    if not path.exists():
        draw = np.random.default_rng(0)
        centres = 2 * draw.standard_normal((MODES, d))
        roots = draw.standard_normal((MODES, d, d)) / d**0.5
        mode = draw.integers(MODES, size=n)
        x = centres[mode] + np.einsum("nij,nj->ni", roots[mode], draw.standard_normal((n, d)))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, x.astype(np.float32))
    return path


def parts_of(bijection: "Bijection") -> list["Bijection"]:
    """Returns the bijections of nested chains as one list."""
    from flowtrain.bijections.base import Chain

    return [part for b in bijection for part in parts_of(b)] if isinstance(bijection, Chain) else [bijection]


def problems(args: argparse.Namespace) -> dict[str, "Problem"]:
    """Returns the field with initial, random and trained weights, and one batch in the units of the field."""
    import torch
    from steps import Problem, fixed_noise, randomize_last_layer

    from flowtrain import load
    from flowtrain.bijections.continuous import Continuous
    from flowtrain.runs import build
    from flowtrain.training import checkpoint, checkpoint_files

    ckpt = args.ckpt or trained_run(args.d, args.train)
    saved = checkpoint.load(checkpoint_files.find(ckpt))
    data = build.build_data(saved["config"])
    flow = load(ckpt)
    both = torch.cat([data.train_batch(10**6 + i, args.batch, seed=1) for i in range(2)])
    with torch.no_grad():
        for bijection in reversed(parts_of(flow.bijection)):
            if isinstance(bijection, Continuous):
                break
            both = bijection.map_inverse(both)
        else:
            raise SystemExit(f"{ckpt} contains no continuous flow: give a run of model=ffjord")
    x, before = both.chunk(2)
    noise = None if data.event_shape[0] <= 8 else fixed_noise(x)
    torch.manual_seed(0)
    fresh = build.build_flow(saved["config"], data.samples)
    initial = next(m for m in fresh.modules() if isinstance(m, Continuous)).field
    random = copy.deepcopy(initial)
    randomize_last_layer(random, 1.0)
    solver = {"method": args.method, "rtol": args.rtol}
    stages = {"initial": initial, "random": random, "trained": bijection.field}
    words = {
        "initial": "initial weights, last layer zero",
        "random": "initial weights, last layer random (torch's default)",
        "trained": f"trained weights, step {saved['step']} of {ckpt}",
    }
    return {words[name]: Problem(stages[name], x, noise, before, solver).to(args.device) for name in args.weights}


def contestants(device: str) -> dict[str, Callable[["Problem"], "Contestant"]]:
    from steps import Skip, flowtrain_step, torchdiffeq_step, zuko_step

    def diffrax(problem: "Problem") -> "Contestant":
        try:
            from diffrax_peer import diffrax_step
        except ImportError as e:
            raise Skip(f"not installed ({e})") from e
        return diffrax_step(problem)

    # without a GPU, the graphs only copy tensors
    graphs = {"flowtrain cuda_graphs": partial(flowtrain_step, cuda_graphs=True)} if device == "cuda" else {}
    return {
        "flowtrain (default)": flowtrain_step,
        **graphs,
        "flowtrain control=all": partial(flowtrain_step, control="all"),
        "flowtrain gradient=replay": partial(flowtrain_step, gradient="replay"),
        "flowtrain gradient=adjoint": partial(flowtrain_step, gradient="adjoint"),
        "torchdiffeq adjoint, autograd trace": partial(torchdiffeq_step, adjoint=True),
        "torchdiffeq direct, autograd trace": partial(torchdiffeq_step, adjoint=False),
        "zuko's engine, max norm": zuko_step,
        "diffrax, jitted": diffrax,
    }


def main() -> None:
    args = arguments()
    use_threads(args.threads, args.device)
    keep_freed_memory()
    from steps import compare, reference

    print(f"{machine(args.device)}; {args.threads} threads")
    chosen = {name: make for name, make in contestants(args.device).items() if any(part in name for part in args.only)}
    for words, problem in problems(args).items():
        b, d = problem.x.shape
        trace = "exact trace" if problem.noise is None else "Hutchinson, 1 Rademacher draw"
        field = f"hidden {'-'.join(str(layer.linear.out_features) for layer in problem.field.body)}"
        progress(f"{words}: reference")
        true = reference(problem)
        print(f"\nd = {d}, batch {b}, {field}, {args.method}, rtol = atol = {args.rtol:g}, {trace}; {words}\n")
        print(compare(chosen, problem, true, args.repeats), flush=True)


if __name__ == "__main__":
    main()
