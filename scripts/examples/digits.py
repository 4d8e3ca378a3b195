"""Trains Glow on digits by class, p(image | label), and draws new digits of each class.

    pip install scikit-learn
    python scripts/examples/digits.py

The script trains on scikit-learn's 1,797 images of 8x8 pixels and writes digits.png with ten samples of each class.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import flowtrain


def main(minutes: float = 2.0, out: str = "digits.png") -> None:
    digits = load_digits()
    # integers from 0 to 16, as images (n, 1, 8, 8)
    images = digits.images.astype("uint8")[:, None]
    flow = flowtrain.fit(images, model="glow", label=digits.target, levels=17, minutes=minutes)

    test = flow.record.held_out["test"]
    print(flowtrain.evaluate(flow, images[test], label=digits.target[test]))

    label = torch.arange(10).repeat_interleave(10)
    samples = flow.quantized(flow.sample(100, label=label, temperature=0.8))
    # a row for each class, and a square of 5x5 points for each pixel
    grid = samples.view(10, 10, 8, 8).permute(0, 2, 1, 3).reshape(80, 80)
    plt.imsave(out, grid.repeat_interleave(5, 0).repeat_interleave(5, 1), cmap="gray")
    print(f"written to {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="time limit of the fit")
    parser.add_argument("--out", default="digits.png")
    arguments = parser.parse_args()
    main(arguments.minutes, arguments.out)
