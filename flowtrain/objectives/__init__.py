"""Objectives: the losses that training minimizes."""

from flowtrain.objectives.base import Objective
from flowtrain.objectives.flow_matching import FlowMatching, Hybrid, Rectified
from flowtrain.objectives.likelihood import Likelihood

__all__ = ["FlowMatching", "Hybrid", "Likelihood", "Objective", "Rectified"]
