"""The layers, ranks and alphas of a student's adapter."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_loras import TINY, small_sd3
from torch import nn

from danceopd.models.blocks import PRESETS, preset_layers
from danceopd.models.students import layer_sizes
from danceopd.support.errors import UserError

ATTENTION = {
    "sd3": "attn.to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out attn2.to_q attn2.to_v",
    "flux": "transformer_blocks.0.attn.to_q add_v_proj to_add_out single_transformer_blocks.1.attn.to_v",
    "flux2": "transformer_blocks.0.attn.to_q to_add_out single_transformer_blocks.1.attn.to_qkv_mlp_proj attn.to_out",
    "qwen": "attn.to_q add_q_proj to_add_out",
    "z": "layers.0.attention.to_q noise_refiner.0.attention.to_k context_refiner.0.attention.to_out.0",
}
FEED_FORWARD = {
    "sd3": "ff.net.0.proj ff.net.2 ff_context.net.0.proj",
    "flux": "ff.net.0.proj ff_context.net.2 single_transformer_blocks.0.proj_mlp single_transformer_blocks.1.proj_out",
    "flux2": "ff.linear_in ff.linear_out ff_context.linear_in",
    "qwen": "img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj",
    "z": "layers.0.feed_forward.w1 layers.0.feed_forward.w2 layers.1.feed_forward.w3",
}


def ends(names, wanted):
    return all(any(name.endswith(end) for name in names) for end in wanted.split())


@pytest.mark.parametrize("family", ATTENTION)
def test_presets_are_the_blocks_layers(family):
    transformer = TINY[family][1]()
    attention, both, every = (preset_layers(transformer, preset) for preset in PRESETS)
    assert ends(attention, ATTENTION[family])
    assert not any(re.search(r"ff|feed_forward|mlp\.net|proj_mlp", name) for name in attention)
    assert ends(set(both) - set(attention), FEED_FORWARD[family])
    assert set(attention) < set(both) < set(every)
    assert not any(re.search(r"norm|mod|embed|refiner_proj", name) for name in both)
    assert every == [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def test_ranks_and_alphas_by_pattern_are_those_of_peft():
    patterns = {
        "rank_pattern": {"to_q": 2, r"1\.attn\.to_out\.0": 3},
        "alpha_pattern": {r"0\.attn\.to_q": 7, "net.2": 1},
    }
    model = get_peft_model(
        small_sd3(), LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "net.2"], **patterns)
    )
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and isinstance(module, nn.Module) and "default" in getattr(module, "r", {})
    }
    sizes = layer_sizes([*layers], 4, 6.0, **patterns)
    for name, module in layers.items():
        rank, alpha = sizes[name]
        assert rank == module.r["default"]
        assert alpha / rank == pytest.approx(module.scaling["default"])
    assert {rank for rank, _ in sizes.values()} == {2, 3, 4}
    own = layer_sizes([*layers], 4, None, patterns["rank_pattern"], {})
    assert all(alpha == rank for rank, alpha in own.values())
    with pytest.raises(UserError, match="no layer of the adapter ends in to_w, which a pattern names"):
        layer_sizes([*layers], 4, None, {"to_w": 2}, {})


def test_a_student_of_patterns_adds_alpha_over_rank_times_its_factors():
    from danceopd.models.backbones import sd3
    from danceopd.models.shared_base import SharedBase
    from danceopd.models.students import LoraStudent

    transformer = small_sd3()
    layers = preset_layers(transformer, "attention")
    sizes = layer_sizes(layers, 4, None, {"to_q": 2}, {"to_q": 8.0})
    student = LoraStudent(SharedBase(transformer, [], sd3.velocity, layers), layers, 4, 4.0, sizes=sizes)
    for name, (a, b, scale) in student.lora().items():
        rank = 2 if name.endswith("to_q") else 4
        assert (len(a), b.shape[1], scale) == (rank, rank, 4.0 if rank == 2 else 1.0)
    assert torch.equal(student.factors_of(layers[0])[0], student.lora()[layers[0]][0])
