"""Walks through submodules agree with those of torch."""

import torch
from torch import nn

from flowtrain.models import nsf
from flowtrain.utils.modules import first_floating, submodules


def test_submodules_have_the_order_of_torch() -> None:
    flow = nsf(3, layers=2)
    assert list(submodules(flow)) == list(flow.modules())


def test_closed_classes_are_not_entered() -> None:
    module = nn.Sequential(nn.Sequential(nn.ReLU()))
    assert len(list(submodules(module, {nn.Sequential}))) == 1


def test_parameters_come_before_buffers() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 1))
    assert first_floating(module) is module[1].weight
    assert first_floating(module[0]) is module[0].running_mean
    assert first_floating(nn.ReLU()) is None


def test_the_tensor_has_the_dtype_of_the_module() -> None:
    found = first_floating(nn.Linear(1, 1).double())
    assert found is not None
    assert found.dtype == torch.float64
