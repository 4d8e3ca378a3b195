"""Computes the entropy of every toy again by quadrature. The toy classes contain the values that this script prints.

    python scripts/entropies.py

The midpoint rule runs on a square that contains all the mass. For a smooth density, its error falls faster than any
power of the cell size once the cells are smaller than the narrowest width (0.08), so all printed digits are correct.
The cells align with the squares of the checkerboard.
"""

from pathlib import Path

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from flowtrain.data.toys.base import Toy

HALF_SIDE = 6.0
CELLS = 480


def grid(cells: int, half_side: float) -> tuple[torch.Tensor, float]:
    """Returns the cell centers (cells^2, 2) of the square [-half_side, half_side]^2 and the area of a cell."""
    width = 2 * half_side / cells
    centres = -half_side + width * (torch.arange(cells, dtype=torch.float64) + 0.5)
    return torch.cartesian_prod(centres, centres), width**2


def entropy_and_integral(toy: Toy) -> tuple[float, float]:
    """Returns -integral of p log p in nats, and the integral of p, which should be 1."""
    points, area = grid(CELLS, HALF_SIDE)
    log_p = toy.log_prob(points)
    p = log_p.exp()
    return float(torch.special.entr(p).sum() * area), float(p.sum() * area)


def main() -> None:
    for path in sorted((Path(__file__).parent.parent / "configs" / "data").glob("*.yaml")):
        # files of tables and images also set keys of other groups, and have no `_target_` at the top
        target = OmegaConf.select(OmegaConf.load(path), "_target_")
        kind = None if target is None else get_class(target)
        if kind is not None and issubclass(kind, Toy):
            entropy, integral = entropy_and_integral(kind())
            print(f"{path.stem:14s} entropy {entropy:.8f}  integral {integral:.10f}")


if __name__ == "__main__":
    main()
