"""NF4: the codes of torchao's, the error of a weight, and a layer that trains what lies before it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from danceopd.models.nf4 import LEVELS, Nf4Linear, packed, unpacked


def test_codes_are_the_nearest_levels_of_each_block():
    torch.manual_seed(0)
    weight = torch.randn(6, 128)
    codes, scale = packed(weight)
    assert (codes.shape, codes.dtype, scale.shape) == ((6, 64), torch.uint8, (6, 2))
    blocks, levels = weight.double().view(6, 2, 64), torch.tensor(LEVELS, dtype=torch.float64)
    most = blocks.abs().amax(2, keepdim=True)
    nearest = (blocks[..., None] / most[..., None] - levels).abs().argmin(-1).view(6, 128)
    assert torch.equal(torch.stack([codes >> 4, codes & 15], -1).view(6, 128).long(), nearest)
    assert torch.equal(scale, most[..., 0].bfloat16())
    expected = levels[nearest].view(6, 2, 64) * scale[..., None].double()
    torch.testing.assert_close(unpacked(codes, scale, torch.float32), expected.view(6, 128).float())


def test_codes_are_torchaos():
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(1)
    weight = torch.randn(256, 64)
    other = quantization.NF4Tensor.from_tensor(weight, 64, 256)
    own = packed(weight)[0].view(-1)
    # torchao rounds the levels to four digits, so that entries at the middle of two may fall to the other.
    assert (own == other.quantized_data).float().mean() > 0.999


@pytest.mark.parametrize("width", [2, 20, 96, 256])
def test_rows_of_any_even_width(width):
    torch.manual_seed(2)
    weight = torch.randn(3, width)
    back = unpacked(*packed(weight), torch.float32)
    assert ((back - weight).norm() / weight.norm()) < 0.13
    assert torch.equal(unpacked(*packed(torch.zeros(3, width)), torch.float32), torch.zeros(3, width))


def test_a_layer_is_that_of_its_unpacked_weight():
    torch.manual_seed(3)
    linear = nn.Linear(64, 24)
    layer, x = Nf4Linear(linear), torch.randn(5, 64, requires_grad=True)
    weight = unpacked(layer.weight, layer.weight_scale, torch.float32)
    expected = F.linear(x, weight, linear.bias)
    torch.testing.assert_close(layer(x), expected)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    (other,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, other)
    assert sum(p.nbytes for p in (layer.weight, layer.weight_scale)) == 24 * 64 // 2 + 24 * 2
