"""Networks: conditioners of couplings, velocity fields of continuous flows, and their divergence."""

from flowtrain.nn.conditioners import MLP, ConvNet, ResidualNet
from flowtrain.nn.conv_field import ConvField
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.nn.velocity_field import Field, LayeredField

__all__ = ["MLP", "ConvField", "ConvNet", "Field", "LayeredField", "MLPField", "ResidualNet", "TraceRule"]
