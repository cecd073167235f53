"""What forwards are counted to compute, against sums by hand, torch's counter, and every kernel of the dispatcher."""

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from danceopd.models.forward_cost import Cost, forward_cost
from danceopd.models.fp8 import to_fp8


def small_sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip


def asking(network):
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.randn(2, 16), torch.full((2,), 500.0)
    return lambda: network(*inputs)


def test_a_layer_and_an_attention_by_hand():
    layer, q, k = nn.Linear(4, 3), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 9, 8)
    assert forward_cost(lambda: layer(torch.randn(5, 4))) == Cost(2 * 5 * 4 * 3, 0)
    attended = 2 * 2 * 3 * 7 * 9 * (8 + 8)  # q k^T and its product with the values
    assert forward_cost(lambda: F.scaled_dot_product_attention(q, k, value=k)) == Cost(attended, 7)


def test_a_transformer_as_torch_counts_it_and_the_tokens_of_its_longest_attention():
    ask = asking(small_sd3())
    # Torch counts no fused attention of the CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ask()
    assert forward_cost(ask) == Cost(counter.get_total_flops(), 16 + 5)


def test_the_same_by_other_kernels_and_in_fp8():
    network = small_sd3()
    expected = forward_cost(asking(network))
    network.set_attention_backend("_native_math")
    assert forward_cost(asking(network)) == expected
    network.set_attention_backend("native")
    assert forward_cost(asking(to_fp8(network))) == expected


def test_nothing_stays_behind():
    network, hooks = small_sd3(), nn.modules.module._global_forward_hooks
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = dict(_AttentionBackendRegistry._backends)
    forward_cost(asking(network))
    assert not hooks
    assert _AttentionBackendRegistry._backends == before
