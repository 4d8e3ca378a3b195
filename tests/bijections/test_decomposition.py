"""The composition of a flow's stages is the flow."""

import pytest
import torch
from helpers.flows import IMAGES, VECTORS, images, vectors

from flowtrain.bijections.base import Chain
from flowtrain.bijections.decomposition import stages


@pytest.mark.parametrize("name", VECTORS)
def test_stages_compose_to_the_flow(name: str) -> None:
    flow = vectors(name)
    z = torch.randn(7, 2)
    x, log_det = Chain(stages(flow.bijection)).forward(z)
    expected, expected_log_det = flow.bijection.forward(z)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(log_det, expected_log_det)


@pytest.mark.parametrize("name", IMAGES)
def test_stages_of_images_act_on_whole_images(name: str) -> None:
    flow = images(name)
    found = stages(flow.bijection)
    assert len(found) > 3
    x = z = torch.randn(3, 1, 4, 4)
    for stage in found:
        x = stage.map_forward(x)
        assert x.shape == z.shape
    torch.testing.assert_close(x, flow(z))
