"""Networks: conditioners of couplings, velocity fields of continuous flows, and their divergence."""

from flowtrain.nn.conditioners import MLP, ConvNet, InformedConv, ResidualNet
from flowtrain.nn.conv_field import ConvField
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.nn.periodic_field import PeriodicField
from flowtrain.nn.residual_mlp import MaskedMLP, ResidualMLP
from flowtrain.nn.velocity_field import Field, LayeredField
from flowtrain.utils.recorded import Recorded

__all__ = [
    "MLP",
    "ConvField",
    "ConvNet",
    "Field",
    "InformedConv",
    "LayeredField",
    "MLPField",
    "MaskedMLP",
    "PeriodicField",
    "Recorded",
    "ResidualMLP",
    "ResidualNet",
    "TraceRule",
]
