"""Finds unusual rows of a table: a flow fitted to ordinary rows scores new rows by -log p(x).

    python scripts/examples/anomalies.py

Ordinary rows have two correlated sensors and a third sensor that depends on both. In the anomalies the third sensor is
broken: each of its values is common, but not in combination with the other two sensors.
"""

import argparse

import numpy as np

import flowtrain


def sensors(n: int, broken: bool, rng: np.random.Generator) -> np.ndarray:
    """Returns rows (n, 3): temperature in degrees, pressure in hPa, and a flow rate that depends on both."""
    temperature = rng.normal(20, 5, n)
    pressure = 1000 + 3 * (temperature - 20) + rng.normal(0, 5, n)
    rate = 0.5 * np.abs(temperature - 20) + 0.02 * (pressure - 1000) + rng.normal(0, 0.1, n)
    if broken:
        rate = rng.permutation(rate)
    return np.column_stack([temperature, pressure, rate])


def main(minutes: float = 0.5) -> float:
    rng = np.random.default_rng(0)
    flow = flowtrain.fit(sensors(5000, broken=False, rng=rng), model="realnvp", minutes=minutes)

    # 1% of ordinary rows have a score above this threshold
    threshold = np.quantile(-flow.log_prob(sensors(2000, broken=False, rng=rng)), 0.99)
    ordinary = -flow.log_prob(sensors(1000, broken=False, rng=rng))
    anomalies = -flow.log_prob(sensors(1000, broken=True, rng=rng))
    auroc = (anomalies[:, None] > ordinary).mean()
    print(f"threshold      {threshold:.2f} nats")
    print(f"false alarms   {(ordinary > threshold).mean():.1%} of 1,000 ordinary rows")
    print(f"found          {(anomalies > threshold).mean():.1%} of 1,000 anomalies")
    print(f"AUROC          {auroc:.3f}")
    return float(auroc)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.5, help="time limit of the fit")
    main(parser.parse_args().minutes)
