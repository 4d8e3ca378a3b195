"""log p of float32 data far from 0, compared with float64."""

import copy

import pytest
import torch

from flowtrain import models

MODELS = {
    "affine": models.affine,
    "realnvp": lambda d: models.realnvp(d, layers=4, hidden=[16]),
    "glow": lambda d: models.glow(d, steps=3, hidden=[16]),
    "nsf": lambda d: models.nsf(d, layers=3, hidden=[16]),
    "maf": lambda d: models.maf(d, layers=3, hidden=[16]),
    "ffjord": lambda d: models.ffjord(d, hidden=[16]),
}


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_log_prob_does_not_lose_digits_of_data_far_from_zero(name: str, is_trained: bool) -> None:
    torch.manual_seed(0)
    flow = MODELS[name](4).float()
    x = torch.randn(200, 4, dtype=torch.float32) + torch.tensor([0.0, 1e3, -1e5, 1e6], dtype=torch.float32)
    with torch.no_grad():
        flow.bijection.initialize(x)
        for p in flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
        # x lies at the centre of the changed flow again
        flow.bijection.initialize(x)
    exact = copy.deepcopy(flow).double().eval()
    found = flow.train(is_trained).log_prob(x.requires_grad_(is_trained))
    torch.testing.assert_close(found.detach().double(), exact.log_prob(x.detach().double()), rtol=1e-4, atol=2e-3)
