"""Coverage of the estimated error of log Z, for importance weights with a known mean.

    python scripts/bench/log_z_coverage.py

Weights follow a log-normal or a Pareto distribution with mean 1, so log Z = 0. The table shows how often the
estimate of log Z is within 1.96 or 3 errors of 0, with and without the part of the tail.
`flowtrain.evaluation.targets` describes the parts.
"""

import argparse
import math

import torch
from common import table
from torch import Tensor

from flowtrain.evaluation.pareto import weight_tail

HEAD = ("weights", "n", "k found", "1.96 errors, no tail", "1.96 errors", "3 errors")
LOG_NORMAL, PARETO = (0.3, 1.0, 2.0), (0.5, 0.6, 0.7, 0.9)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[2000, 20_000], help="numbers of samples")
    parser.add_argument("--repetitions", type=int, default=400)
    return parser.parse_args()


def draws(kind: str, value: float, n: int, generator: torch.Generator) -> Tensor:
    """Returns n log weights with E[w] = 1.

    Args:
        kind: log-normal | Pareto.
        value: the standard deviation of log w, or k of the Pareto distribution.
    """
    if kind == "log-normal":
        return value * torch.randn(n, dtype=torch.float64, generator=generator) - value**2 / 2
    u = torch.rand(n, dtype=torch.float64, generator=generator)
    return -value * torch.log1p(-u) + math.log1p(-value)


def measured(log_w: Tensor) -> tuple[float, float, float, float]:
    """Returns the estimate of log Z, the parts sampling and tail of its error, and Pareto k."""
    w = (log_w - log_w.max()).exp()
    mean, tail = float(w.mean()), weight_tail(w)
    assert tail is not None
    log_z = math.log(mean) + float(log_w.max())
    return log_z, float(w.std()) / mean / math.sqrt(len(w)), tail.missed(mean) / mean, tail.k


def main() -> None:
    given = arguments()
    rows = []
    cases = [("log-normal", value) for value in LOG_NORMAL] + [("Pareto", value) for value in PARETO]
    for n in given.n:
        for kind, value in cases:
            generator = torch.Generator().manual_seed(0)
            found = [measured(draws(kind, value, n, generator)) for _ in range(given.repetitions)]
            log_z, sampling, tail, k = torch.tensor(found, dtype=torch.float64).T
            total = (sampling.square() + tail.square()).sqrt()
            covered = [
                (log_z.abs() <= error).double().mean().item() for error in (1.96 * sampling, 1.96 * total, 3 * total)
            ]
            rows.append(
                (f"{kind} {value:g}", f"{n:,}", f"{float(k.mean()):.2f}", *(f"{share:.0%}" for share in covered))
            )
    print(table(HEAD, rows))


if __name__ == "__main__":
    main()
