"""Invertible maps between base and data, each with its log-determinant."""

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import Bijection, Chain, Pass
from flowtrain.bijections.circular import CircularSpline, RealThenCircular, WrapAngles
from flowtrain.bijections.columns import OnColumns
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.coupling import AffineCoupling, CheckerboardCoupling, Coupling, HalfCoupling, IndexCoupling
from flowtrain.bijections.elementwise import Elementwise, ScaleShift
from flowtrain.bijections.linear import (
    Affine,
    ContextShift,
    FromGaussian,
    GaussianStart,
    InvertibleLinear,
    Permutation,
    Preconditioned,
)
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.bijections.scale import ActNorm, BatchNorm, Standardize
from flowtrain.bijections.spline import Spline
from flowtrain.bijections.squeeze import FactorOut, Squeeze, Wrapped
from flowtrain.bijections.support import ToSupport
from flowtrain.bijections.table_chain import TableChain

__all__ = [
    "ActNorm",
    "Affine",
    "AffineCoupling",
    "Autoregressive",
    "BatchNorm",
    "Bijection",
    "Chain",
    "CheckerboardCoupling",
    "CircularSpline",
    "ContextShift",
    "Continuous",
    "Coupling",
    "Elementwise",
    "FactorOut",
    "FromGaussian",
    "GaussianStart",
    "HalfCoupling",
    "IndexCoupling",
    "InvertibleLinear",
    "Logit",
    "OnColumns",
    "Pass",
    "Permutation",
    "Preconditioned",
    "RealThenCircular",
    "Regularizer",
    "ScaleShift",
    "Spline",
    "Squeeze",
    "Standardize",
    "TableChain",
    "ToSupport",
    "WrapAngles",
    "Wrapped",
]
