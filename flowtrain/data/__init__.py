"""Data sets: toys with known densities, images, and tables from the user's files."""

from flowtrain.data.base import Dataset, Samples
from flowtrain.data.images import IDXImages
from flowtrain.data.tables.array import ArrayData
from flowtrain.data.toys.base import Toy
from flowtrain.data.toys.shapes import (
    Checkerboard,
    Circles,
    EightGaussians,
    Moons,
    Pinwheel,
    Rings,
    SwissRoll,
    TwoSpirals,
)

__all__ = [
    "ArrayData",
    "Checkerboard",
    "Circles",
    "Dataset",
    "EightGaussians",
    "IDXImages",
    "Moons",
    "Pinwheel",
    "Rings",
    "Samples",
    "SwissRoll",
    "Toy",
    "TwoSpirals",
]
