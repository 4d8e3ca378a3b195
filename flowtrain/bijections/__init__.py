"""Invertible maps between base and data, each with its log-determinant."""

from flowtrain.bijections.base import Bijection, Chain, Pass
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.coupling import AffineCoupling, CheckerboardCoupling, HalfCoupling, IndexCoupling
from flowtrain.bijections.linear import (
    Affine,
    FromGaussian,
    GaussianStart,
    InvertibleLinear,
    Permutation,
    Preconditioned,
)
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.bijections.scale import ActNorm, BatchNorm, Standardize
from flowtrain.bijections.squeeze import FactorOut, Squeeze, Wrapped

__all__ = [
    "ActNorm",
    "Affine",
    "AffineCoupling",
    "BatchNorm",
    "Bijection",
    "Chain",
    "CheckerboardCoupling",
    "Continuous",
    "FactorOut",
    "FromGaussian",
    "GaussianStart",
    "HalfCoupling",
    "IndexCoupling",
    "InvertibleLinear",
    "Logit",
    "Pass",
    "Permutation",
    "Preconditioned",
    "Regularizer",
    "Squeeze",
    "Standardize",
    "Wrapped",
]
