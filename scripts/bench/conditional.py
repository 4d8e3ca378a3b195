"""Measures the KL of conditional flows on problems with known densities p(x | c).

    python scripts/bench/conditional.py --minutes 2 --seeds 0 1 2

For each problem, model and seed, a flow is fitted to 200,000 rows with the default settings of tables. The mean KL,
E_c KL(p(. | c) || q(. | c)) = E[log p(x | c) - log q(x | c)], is estimated on 20,000 other rows.

Problems:

- linear: x = A c + b + N(0, S), with c ~ N(0, I) in two dimensions and x in three dimensions.
- regressions: one column, x = (1 + c) or x = -(1 + c) / 2 with probabilities 0.7 and 0.3, plus N(0, 0.3^2), and
  c ~ U(-1, 2).
- rotated: the toy `moons`, rotated by an angle c ~ U(-pi/2, pi/2).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import flowtrain
from flowtrain.data.toys.shapes import Moons
from flowtrain.utils.errors import ConfigError

N_TRAIN, N_TEST = 200_000, 20_000
MODELS = ("nsf", "realnvp", "ffjord")
# (c (n, k), x (n, d), log p(x | c) (n,)), all float64
Rows = tuple[Tensor, Tensor, Tensor]


def linear(n: int, generator: torch.Generator) -> Rows:
    """Draws rows of a linear Gaussian model."""
    a = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-1.2, 0.4]], dtype=torch.float64)
    factor = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.4]], dtype=torch.float64)
    c = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    log_p = -0.5 * noise.square().sum(1) - 1.5 * math.log(2 * math.pi) - factor.diagonal().log().sum()
    return c, c @ a.T + torch.tensor([1.0, 0.0, -2.0]) + noise @ factor.T, log_p


def regressions(n: int, generator: torch.Generator) -> Rows:
    """Draws rows of a mixture of two regressions."""
    c = 3 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1
    means, weights = torch.cat([1 + c, -(1 + c) / 2], 1), torch.tensor([0.7, 0.3], dtype=torch.float64)
    chosen = (torch.rand(n, generator=generator, dtype=torch.float64) > 0.7).long().unsqueeze(1)
    x = means.gather(1, chosen) + 0.3 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    log_p = torch.distributions.Normal(means, 0.3).log_prob(x) + weights.log()
    return c, x, log_p.logsumexp(1)


def rotated(n: int, generator: torch.Generator) -> Rows:
    """Draws rows of rotated moons. A rotation does not change the density."""
    moons = Moons(n_val=1, n_test=1)
    angle = math.pi * (torch.rand(n, 1, generator=generator, dtype=torch.float64) - 0.5)
    x = moons.sample(n, generator)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat([cos * x[:, :1] - sin * x[:, 1:], sin * x[:, :1] + cos * x[:, 1:]], 1)
    return angle, turned, moons.log_prob(x)


PROBLEMS: dict[str, Callable[[int, torch.Generator], Rows]] = {
    "linear": linear,
    "regressions": regressions,
    "rotated": rotated,
}


def measure(
    problem: str, model: str, seed: int, rows: int, minutes: float | None, overrides: list[str]
) -> dict[str, object]:
    """Fits one flow and returns its KL with its standard error, in nats, and the seconds of the fit."""
    generator = torch.Generator().manual_seed(1000 + seed)
    c, x, _ = PROBLEMS[problem](rows, generator)
    begun = time.perf_counter()
    flow = flowtrain.fit(
        x.numpy(), context=c.numpy(), model=model, seed=seed, minutes=minutes, progress=False, overrides=overrides
    )
    seconds = time.perf_counter() - begun
    c, x, log_p = PROBLEMS[problem](N_TEST, generator)
    gap = log_p.numpy() - flow.log_prob(x.numpy(), c.numpy())
    kl, stderr = float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))
    return {
        "problem": problem,
        "model": model,
        "seed": seed,
        "rows": rows,
        "kl": kl,
        "stderr": stderr,
        "seconds": seconds,
    }


def main() -> None:
    """Runs the benchmark. Prints one line of JSON for each flow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", type=int, default=N_TRAIN, help="rows to fit to, of which 80%% are for training")
    parser.add_argument("--minutes", type=float, default=None, help="time limit of a fit; without it, default steps")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of flowtrain")
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    given = parser.parse_args()
    for problem in given.problems:
        for model in given.models:
            for seed in given.seeds:
                try:
                    line = json.dumps(measure(problem, model, seed, given.rows, given.minutes, given.set))
                except ConfigError as e:
                    # RealNVP needs two columns, for example
                    print(f"{problem} {model}: {e}", file=sys.stderr)
                    continue
                print(line)
                sys.stdout.flush()
                if given.out is not None:
                    with given.out.open("a") as f:
                        f.write(line + "\n")


if __name__ == "__main__":
    main()
