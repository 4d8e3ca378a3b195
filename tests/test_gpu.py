"""On a CUDA device: `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from flowtrain.build import build_data, load
from flowtrain.cli.common import compose_defaults
from flowtrain.run import messages, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("model", ["affine", "realnvp", "ffjord"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_trains_and_agrees_with_the_cpu(model: str, trace: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    keys = [f"model={model}", "device=cuda", "trainer.steps=5", "trainer.val_every=5", "data.n_test=100"]
    config = compose_defaults([*keys, *([f"model.trace={trace}"] if model == "ffjord" else [])])
    with messages():
        _, code = train(config, tmp_path)
    assert code == 0
    x = build_data(config).test
    on_gpu = load(tmp_path, "cuda").log_prob(x)
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), load(tmp_path).log_prob(x), rtol=1e-4, atol=1e-4)
