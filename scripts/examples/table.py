"""Fits the density of a table, evaluates it on held-out rows, saves the flow and draws samples.

python scripts/examples/table.py              # a generated table
python scripts/examples/table.py mine.csv     # your own: a header, then rows of numbers
"""

import argparse
from pathlib import Path

import numpy as np

import flowtrain


def generated(n: int = 4000) -> np.ndarray:
    """Returns rows (n, 3) on two rings at different heights."""
    rng = np.random.default_rng(0)
    which, angle = rng.integers(0, 2, n), rng.uniform(0, 2 * np.pi, n)
    radius = 1 + which + rng.normal(0, 0.1, n)
    return np.column_stack([radius * np.cos(angle), radius * np.sin(angle), which + rng.normal(0, 0.2, n)])


def main(path: str | None = None, minutes: float = 1.0, out: str = "table.pt") -> float:
    x = generated() if path is None else np.genfromtxt(path, delimiter=",", skip_header=1)
    rows = np.random.default_rng(1).permutation(len(x))
    train, test = x[rows[len(x) // 5 :]], x[rows[: len(x) // 5]]

    flow = flowtrain.fit(train, model="ffjord", minutes=minutes)
    result = flowtrain.evaluate(flow, test, trained_on=train)
    print(result)

    flow.save(out)
    again = flowtrain.load(out)
    print(f"mean of 1,000 samples  {again.sample(1000).mean(0).tolist()}")
    print(f"mean of the table      {x.mean(0).tolist()}")
    return result.nll


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="a CSV file")
    parser.add_argument("--minutes", type=float, default=1.0, help="time limit of the fit")
    parser.add_argument("--out", type=Path, default="table.pt", help="the file of the flow")
    arguments = parser.parse_args()
    main(arguments.path, arguments.minutes, arguments.out)
