"""The optimizer, compared with torch.optim."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from flowtrain.training.adam import Adam


@pytest.mark.parametrize("decoupled", [False, True])
def test_updates_equal_torch_to_the_last_bit(decoupled: bool) -> None:
    """One parameter has no gradient in some steps, and the optimizer is saved and loaded after half of the steps."""
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(n, 3)) for n in (1, 4, 33)]
    its = copy.deepcopy(mine)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    other = kind(its, lr=0.1, weight_decay=0.01, fused=True)
    optimizer = Adam(mine, 0.1, 0.01, decoupled)
    for step in range(12):
        if step == 6:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = Adam(mine, 0.1, 0.01, decoupled)
            optimizer.load_state_dict(saved)
        for group in (*optimizer.param_groups, *other.param_groups):
            group["lr"] = 0.1 / (1 + step)
        optimizer.zero_grad()
        other.zero_grad()
        for i, (p, q) in enumerate(zip(mine, its, strict=True)):
            if i != 1 or step not in (0, 1, 5, 8):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        optimizer.update()
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, its, strict=True)), step
    counts = [[float(o.state[p]["step"]) for p in ps] for o, ps in ((optimizer, mine), (other, its))]
    assert counts == [[12, 8, 12]] * 2


def test_an_update_after_clearing_the_state_starts_anew() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Adam([p], 0.1, 0.0, False)
    for cleared in (False, False, True):
        if cleared:
            optimizer.state.clear()
        p.grad = torch.ones(3)
        optimizer.update()
    assert float(optimizer.state[p]["step"]) == 1


def test_updates_do_not_import_the_compiler() -> None:
    """torch's own optimizers import torch._dynamo, which takes a second."""
    code = (
        "import sys, torch; from flowtrain.training.adam import Adam; p = torch.nn.Parameter(torch.ones(2))\n"
        "o = Adam([p], 0.1, 0.0, True); p.sum().backward(); o.update(); o.zero_grad()\n"
        "o.load_state_dict(o.state_dict())\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
