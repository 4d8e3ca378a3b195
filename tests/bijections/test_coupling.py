"""Orders of the columns in stacks of couplings."""

from math import ceil

import pytest
import torch

from flowtrain.bijections.coupling import Coupling, coupling_order
from flowtrain.bijections.linear import InvertibleLinear, Permutation
from flowtrain.models import nsf, realnvp

MODELS = {
    "nsf permutation": lambda d, n: nsf(d, layers=n, hidden=[4], mixing="permutation"),
    "nsf linear": lambda d, n: nsf(d, layers=n, hidden=[4], mixing="linear"),
    "realnvp permutation": lambda d, n: realnvp(d, layers=n, hidden=[4], mixing="permutation"),
}


@pytest.mark.parametrize("d", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("name", MODELS)
def test_each_group_of_couplings_transforms_all_columns(name, d):
    in_group = ceil(d / (d // 2))
    for _ in range(5):
        flow = MODELS[name](d, 3 * in_group).double()
        for key, p in flow.named_parameters():
            if "conditioner" in key and key.endswith("bias"):
                torch.nn.init.uniform_(p, 0.5, 1.0)
        # the values and the names of the columns between two layers
        z, columns = torch.randn(1, d, dtype=torch.float64), torch.arange(d, dtype=torch.float64).unsqueeze(0)
        n, changed = 0, set()
        for layer in flow.bijection:
            if isinstance(layer, Permutation | InvertibleLinear):
                z, columns = layer(z)[0], layer(columns)[0]
            elif isinstance(layer, Coupling):
                x = layer(z)[0]
                changed |= set(columns[x != z].round().long().tolist())
                z, n = x, n + 1
                if n % in_group == 0:
                    assert changed == set(range(d))
                    changed = set()
        assert n == 3 * in_group


def test_each_group_begins_with_a_random_order():
    assert len({tuple(coupling_order(3, 3, 1, 1).tolist()) for _ in range(200)}) == 6
    assert len({tuple(coupling_order(4, 3, 1, 1).tolist()) for _ in range(200)}) == 1
