"""LoRA files: each layout gives diffusers' own weights, and no key is left out in silence."""

import json

import diffusers
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_loras import SD3, TINY, batch, close, diffusers_deltas, prompts, small_sd3
from tiny_sd3 import save_tiny

from danceopd.models.backbones import sd3
from danceopd.models.lora_algebra import merge_into
from danceopd.models.lora_files import load_lora, lora_parameters, trained_for
from danceopd.models.shared_base import SharedBase
from danceopd.models.weights import of_tensors
from danceopd.support.errors import UserError


def factors(shapes, rank=4, style=("lora_down", "lora_up"), alpha=None, seed=0):
    """A state dict by name: {name: (in, out)}."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for i, (name, (width, out)) in enumerate(shapes.items()):
        state[f"{name}.{style[0]}.weight"] = torch.randn(rank, width, generator=generator)
        state[f"{name}.{style[1]}.weight"] = torch.randn(out, rank, generator=generator)
        if alpha:
            state[f"{name}.alpha"] = torch.tensor(alpha + i)
    return state


LAYOUTS = {
    "sd3, diffusers": ("sd3", lambda: factors(
        {"transformer.transformer_blocks.0.attn.to_q": (16, 16), "transformer.transformer_blocks.1.ff.net.2": (64, 16)},
        style=("lora_A", "lora_B"))),
    "sd3, older diffusers": ("sd3", lambda: factors(
        {"transformer.transformer_blocks.0.attn.to_q": (16, 16), "transformer.transformer_blocks.1.ff.net.2": (64, 16)},
        style=("lora.down", "lora.up"))),
    "flux, kohya": ("flux", lambda: factors(
        {"lora_unet_double_blocks_0_img_attn_qkv": (16, 48), "lora_unet_double_blocks_1_txt_attn_proj": (16, 16),
         "lora_unet_double_blocks_1_img_mlp_0": (16, 64), "lora_unet_single_blocks_0_linear2": (80, 16),
         "lora_unet_single_blocks_1_modulation_lin": (16, 48)}, alpha=2.0)),
    "flux, ComfyUI": ("flux", lambda: factors(
        {"diffusion_model.double_blocks.0.img_attn.qkv": (16, 48), "diffusion_model.single_blocks.1.linear2": (80, 16)},
        alpha=1.0)),
    "flux, kohya of diffusers' names": ("flux", lambda: factors(
        {"lora_transformer_transformer_blocks_0_attn_to_q": (16, 16),
         "lora_transformer_single_transformer_blocks_1_attn_to_v": (16, 16)}, alpha=3.0)),
    "flux, ai-toolkit with alphas": ("flux", lambda: factors(
        {"transformer.transformer_blocks.0.attn.to_k": (16, 16),
         "transformer.transformer_blocks.0.attn.to_v": (16, 16)}, style=("lora_A", "lora_B"), alpha=2.0)),
    "flux, xlabs": ("flux", lambda: factors(
        {"double_blocks.0.processor.qkv_lora1": (16, 48), "double_blocks.0.processor.proj_lora2": (16, 16)},
        style=("down", "up"))),
    "flux2, ai-toolkit": ("flux2", lambda: factors(
        {"diffusion_model.double_blocks.0.img_attn.qkv": (16, 48),
         "diffusion_model.single_blocks.1.linear2": (64, 16)}, style=("lora_A", "lora_B"))),
    "flux2, kohya": ("flux2", lambda: factors(
        {"lora_unet_double_blocks_0_txt_attn_qkv": (16, 48), "lora_unet_double_blocks_1_img_attn_proj": (16, 16)},
        alpha=3.0)),
    "flux2, PEFT keys of the original names": ("flux2", lambda: factors(
        {"base_model.model.double_blocks.1.txt_attn.proj": (16, 16)}, style=("lora_A", "lora_B"))),
    "qwen, ComfyUI": ("qwen", lambda: factors(
        {"diffusion_model.transformer_blocks.0.attn.to_q": (16, 16),
         "diffusion_model.transformer_blocks.1.img_mlp.net.0.proj": (16, 64)}, style=("lora_A", "lora_B"), alpha=1.0)),
    "qwen, kohya": ("qwen", lambda: factors(
        {"lora_unet_transformer_blocks_0_attn_add_q_proj": (16, 16), "lora_unet_img_in": (16, 16)}, alpha=2.0)),
    "z, ai-toolkit": ("z", lambda: factors(
        {"diffusion_model.layers.0.attention.to_q": (16, 16), "diffusion_model.layers.1.attention.to_out.0": (16, 16)},
        style=("lora_A", "lora_B"))),
    "z, kohya": ("z", lambda: factors(
        {"lora_unet_layers_0_attention_to_k": (16, 16), "lora_unet_context_refiner_0_feed_forward_w1": (16, 42)},
        alpha=2.0)),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_of_this_layout_gives_the_weights_that_diffusers_gives_it(layout, tmp_path):
    family, write = LAYOUTS[layout]
    pipeline_class, build = TINY[family]
    transformer = build()
    save_file(write(), tmp_path / "lora.safetensors", metadata={"format": "pt"})
    expected = diffusers_deltas(transformer, tmp_path / "lora.safetensors", pipeline_class)
    lora = load_lora(tmp_path, transformer, pipeline_class, scale=0.5)
    assert lora.keys() == expected.keys()
    for name, (a, b, scale) in lora.items():
        close(scale * b @ a, 0.5 * expected[name])


def test_of_a_kohya_file_the_layers_that_diffusers_forgets_are_there(tmp_path):
    # The converter leaves "transformer." out of these names, and loses the last layer's alpha.
    _, build = TINY["flux"]
    shapes = {"lora_unet_txt_in": (12, 16), "lora_unet_final_layer_linear": (16, 4)}
    state = factors(shapes, rank=4, alpha=1.0)
    save_file(state, tmp_path / "lora.safetensors")
    lora = load_lora(tmp_path, build(), diffusers.FluxPipeline)
    for name, key, scale in (("context_embedder", "lora_unet_txt_in", 0.25), ("proj_out", [*shapes][1], 0.5)):
        a, b, s = lora[name]
        close(s * b @ a, scale * state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"])


CONFIG = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["to_q", "to_out.0", "net.2"],
    "rank_pattern": {"to_q": 2, "1.attn.to_out.0": 3},
    "alpha_pattern": {"ff.net.2": 1, "transformer_blocks.1.attn.to_q": 9},
}


def fill(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder_gives_the_weights_that_peft_gives_it(rslora, tmp_path):
    model = get_peft_model(small_sd3(), LoraConfig(**CONFIG, use_rslora=rslora))
    fill(model)
    model.save_pretrained(tmp_path / "lora")
    expected = dict(model.merge_and_unload().named_parameters())
    for path in (tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
        result = merge_into(small_sd3(), load_lora(path, small_sd3(), SD3))
        for name, parameter in result.named_parameters():
            close(parameter, expected[name])


@torch.no_grad()
@pytest.mark.parametrize("bare", [False, True])
def test_a_diffusers_file_gives_the_velocity_of_the_pipeline_that_loaded_it(bare, tmp_path):
    folder = save_tiny(tmp_path / "sd3")
    trained = sd3.load_transformer(folder)
    trained.add_adapter(LoraConfig(**CONFIG))
    fill(trained)
    if bare:  # without the prefix "transformer."
        trained.save_lora_adapter(tmp_path / "lora")
    else:
        from diffusers.training_utils import _collate_lora_metadata
        from peft.utils import get_peft_model_state_dict

        layers, metadata = get_peft_model_state_dict(trained), _collate_lora_metadata({"transformer": trained})
        SD3.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers, **metadata)
    pipe = SD3.from_pretrained(folder)
    if bare:
        pipe.transformer.load_lora_adapter(str(tmp_path / "lora"), prefix=None, use_safetensors=True)
    else:
        pipe.load_lora_weights(str(tmp_path / "lora"))
    transformer = sd3.load_transformer(folder)
    lora = load_lora(tmp_path / "lora", transformer, SD3)
    (latents, sigma), conditioning = batch(2), prompts(2, wide=40, pooled=32)
    expected = sd3.velocity(pipe.transformer, latents, sigma, conditioning.prompt)
    base = sd3.velocity(transformer, latents, sigma, conditioning.prompt)
    assert (expected - base).abs().max() > 1e-3 * base.abs().max()
    close(SharedBase(transformer, [lora], sd3.velocity).field(0)(latents, sigma, conditioning), expected)


Q, QUERY = "transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"


GOOD = {Q: (16, 16)}


def ab(shapes):
    return factors(shapes, style=("lora_A", "lora_B"))


@pytest.mark.parametrize(
    ("family", "state", "message"),
    [
        ("sd3", ab(GOOD) | {f"{Q}.lora_magnitude_vector": torch.ones(9)}, r"magnitude is \[9\], for weights of \[16"),
        ("sd3", ab(GOOD) | {f"{Q}s.lora_magnitude_vector": torch.ones(16)}, "nearest layers to .*to_qs are .*to_q"),
        ("sd3", {f"{Q}.dora_scale": torch.ones(16, 1)}, "to_q has a magnitude and no factors of the same layer"),
        ("sd3", ab(GOOD) | {f"{Q}.wd_for_diff": torch.ones(1)}, "decomposed in the change itself; merge it .*LyCORIS"),
        ("sd3", {f"{Q}.vera_lambda_b": torch.ones(16)}, "is a VeRA, .*peft.save_as_lora"),
        ("sd3", {"emb_params": torch.ones(4, 16)}, "is a textual inversion and no change of weights"),
        ("sd3", {"bundle_emb.cat.clip_l": torch.ones(4, 16)}, "is a textual inversion and no change of weights"),
        ("sd3", ab(GOOD) | {f"{Q}.lora_B.bias": torch.ones(16)}, "they change biases; train it without .*lora_bias"),
        ("flux", ab(GOOD) | {"base_model.model.x_embedder.weight": torch.ones(16, 4)},
         r"x_embedder.weight: whole weights beside its LoRA \(PEFT: modules_to_save\)"),
        ("flux", {"x_embedder.weight": torch.ones(16, 4), "x_embedder.bias": torch.ones(16)}, "weights and no LoRA"),
        ("sd3", ab(GOOD) | {f"{Q}.diff": torch.ones(16, 16)}, "to_q has a LoRA and another change beside it"),
        ("sd3", {f"{Q}.lokr_w1": torch.ones(4, 4)}, "to_q has no lokr_w2_a; the file is incomplete"),
        ("sd3", {f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.lokr_w2": torch.ones(3, 3)}, "trained for another model"),
        ("sd3", {f"{Q}.oft_blocks": torch.ones(2, 4, 4)}, "is an OFT or BOFT"),
        ("sd3", ab({"hidden.transformer_blocks.0.attn.to_q": (16, 16)}), "the prefix 'hidden.' is none that is known"),
        ("sd3", ab({"transformer.transformer_blocks.0.atn.to_q": (16, 16)}), "nearest layers to .*blocks.0.attn.to_q"),
        ("sd3", factors({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k": (16, 16)}),
         "its keys are those of a UNet, as Stable Diffusion"),
        ("flux", factors({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16)}),
         "its keys are those of a UNet, as Stable Diffusion"),
        ("z", factors({"lora_unet_double_blocks_0_img_attn_qkv": (16, 48)}), "its keys are those of FLUX"),
        ("flux", ab({"diffusion_model.double_blocks.0.img_attn_qkv": (16, 48)}), "those of HunyuanVideo's"),
        ("sd3", ab(GOOD) | {f"{Q}.lora_A.weight": torch.full((4, 16), float("nan"))}, "to_q.lora_A.weight.*not finite"),
        ("sd3", {f"{Q}.alpha": torch.ones(())}, "no number beside a pair"),
        ("sd3", ab(GOOD) | ab({"text_encoder.layers.0.fc1": (8, 8)}), "they change a text encoder.*docs/loras.md"),
        ("sd3", ab(GOOD) | ab({"transformer.transformer_blocks.9.attn.to_q": (16, 16)}), "blocks.9.attn.to_q.lora_A"),
        ("sd3", ab(GOOD) | ab({"transformer.pos_embed.proj": (16, 16)}), "pos_embed.proj.lora_A"),
        ("sd3", ab({Q: (24, 24)}), r"to_q is 16 -> 16 .* \[4, 24\] and \[24, 4\]; it was trained for another"),
        ("sd3", {f"{Q}.lora_A.weight": torch.ones(4, 16)}, "only one of its two factors"),
        ("sd3", factors({"lora_unet_joint_blocks_2_context_block_adaLN_modulation_1": (16, 32)}),
         "cannot take all of this LoRA"),
        ("sd3", ab(GOOD) | {f"{Q}.alpha": torch.ones(2)}, "no number beside a pair"),
        ("sd3", ab(GOOD) | {"transformer.x.alpha": torch.ones(())}, "transformer.x.alpha: no number beside a pair"),
        ("sd3", ab(GOOD) | {f"{Q}.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}, "not floating point"),
        # what diffusers' converters leave out in silence
        ("flux", factors({"lora_unet_double_blocks_0_img_attn_proj": (16, 16),
                          "text_encoders.t5xxl.transformer.block": (8, 8)}), "t5xxl.* change a text encoder"),
        ("flux", factors({"lora_unet_double_blocks_0_img_attn_proj": (16, 16)})
         | {"lora_unet_double_blocks_0_img_attn_proj.diff_b": torch.ones(16)}, "diff_b would be left out"),
        ("flux", factors({"transformer.transformer_blocks.0.attn.to_q": (16, 16), "another.layer": (16, 16)}),
         "another.layer.* would be left out"),
        ("flux", factors({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 8),
                          "lora_unet_double_blocks_0_img_attn_proj": (16, 16)}, alpha=2.0),
         "text_encoder.*would be left out.*change a text encoder"),
        ("flux", factors({"lora_unet_double_blocks_44_img_attn_proj": (16, 16)}),
         "double_blocks_44_.* has such blocks 0 to 1 and no double_blocks_44"),
        ("flux", factors({"lora_unet_double_blocks_7_img_attn_proj": (16, 16)}), r"blocks\.7\.attn\.to_out"),
        ("qwen", ab({"diffusion_model.transformer_blocks.0.attn.to_q": (16, 16)})
         | {"diffusion_model.norm.diff": torch.ones(3)}, "norm.diff has 1 axes and changes no linear layer"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_taken_is_an_error(family, state, message, tmp_path):
    pipeline_class, build = TINY[family]
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message) as error:
        load_lora(tmp_path / "lora.safetensors", build(), pipeline_class)
    assert str(tmp_path / "lora.safetensors") in str(error.value)


# {a file's name of a fused or renamed layer: the layers that it stands for, by family}
OTHER_NAMES = {
    "z, original": ("z", "diffusion_model.layers.{}.attention.", {
        "qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}),
    "z, kohya": ("z", "lora_unet_layers_{}_attention_", {"qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}),
    "sd3, original": ("sd3", "diffusion_model.joint_blocks.{}.", {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.proj": ("attn.to_out.0",),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",)}),
    "sd3, kohya": ("sd3", "lora_unet_joint_blocks_{}_", {
        "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "context_block_attn_qkv": (
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")}),
    "flux, fused by diffusers": ("flux", "transformer.transformer_blocks.{}.attn.", {
        "to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}),
    "qwen, twice wrapped": ("qwen", "base_model.model.transformer.transformer.transformer_blocks.{}.attn.", {
        "to_q": ("to_q",), "to_qkv": ("to_q", "to_k", "to_v")}),
}  # fmt: skip

OWN = {"z": "layers.{}.attention.", "sd3": "transformer_blocks.{}."}


@pytest.mark.parametrize("layout", OTHER_NAMES)
@pytest.mark.parametrize("block", [0, 1])
def test_fused_and_renamed_layers_get_the_rows_that_are_theirs(layout, block, tmp_path):
    family, prefix, names = OTHER_NAMES[layout]
    pipeline_class, build = TINY[family]
    transformer, own = build(), OWN.get(family, "transformer_blocks.{}.attn.").format(block)
    for alpha, (name, layers) in enumerate(names.items(), 1):
        shapes = [transformer.get_submodule(own + layer).weight.shape for layer in layers]
        key = prefix.format(block) + name
        state = factors({key: (shapes[0][1], sum(out for out, _ in shapes))}, alpha=alpha)
        save_file(state, tmp_path / "lora.safetensors")
        lora = load_lora(tmp_path, transformer, pipeline_class, scale=0.5)
        change = 0.5 * alpha / 4 * state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"]
        assert [*lora] == [own + layer for layer in layers]
        assert lora_parameters(tmp_path, transformer, pipeline_class) == (sum(map(numbers, lora.values())), "LoRA")
        for (a, b, scale), rows in zip(lora.values(), change.split([out for out, _ in shapes]), strict=True):
            close(scale * b @ a, rows)


def numbers(factors_of_one):
    a, b, _ = factors_of_one
    return a.numel() + b.numel()


def test_a_layer_that_is_named_alone_and_in_a_fused_one_must_have_one_change(tmp_path):
    fused = factors({"diffusion_model.layers.0.attention.qkv": (16, 48)})
    (down, up), key = fused.values(), "diffusion_model.layers.0.attention.to_k"
    same = {f"{key}.lora_down.weight": down.clone(), f"{key}.lora_up.weight": up[16:32].clone()}
    save_file(fused | same, tmp_path / "lora.safetensors")
    pipeline_class, build = TINY["z"]
    lora = load_lora(tmp_path, build(), pipeline_class)
    assert sorted(name[-4:] for name in lora) == ["to_k", "to_q", "to_v"]
    save_file(fused | same | {f"{key}.lora_up.weight": up[:16].clone()}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="are the same layer, and the file changes it in two ways"):
        load_lora(tmp_path, build(), pipeline_class)


def lokr(key, w1, w2, alpha=None, seed=0):
    """A LoKr's tensors: each part [rows, columns] whole, or [rows, rank, columns] as two factors; and their product."""
    generator, state, parts = torch.Generator().manual_seed(seed), {}, []
    for name, shape in (("w1", w1), ("w2", w2)):
        if len(shape) == 2:
            parts.append(torch.randn(shape, generator=generator))
            state[f"{key}.lokr_{name}"] = parts[-1]
        else:
            b, a = torch.randn(shape[:2], generator=generator), torch.randn(shape[1:], generator=generator)
            state |= {f"{key}.lokr_{name}_a": b, f"{key}.lokr_{name}_b": a}
            parts.append(b @ a)
    if alpha:
        state[f"{key}.alpha"] = torch.tensor(alpha)
    return state, torch.kron(*parts)


Z_Q = "layers.0.attention.to_q"
NAMES = ["diffusion_model.layers.0.attention.to_q", "lycoris_layers_0_attention_to_q", f"transformer.{Z_Q}", Z_Q]


@pytest.mark.parametrize("key", NAMES)
@pytest.mark.parametrize(
    ("w1", "w2", "factor", "rank"),
    [
        ((4, 4), (4, 4), 1.0, 16),  # alpha counts only where something has a rank
        ((4, 4), (4, 2, 4), 3.0 / 2, 8),
        ((2, 1, 2), (8, 8), 3.0 / 1, 8),
        ((2, 1, 2), (8, 3, 8), 3.0 / 3, 3),
        ((2, 8), (8, 2), 1.0, 4),
    ],
)
def test_a_lokr_is_its_kronecker_product(key, w1, w2, factor, rank, tmp_path):
    state, product = lokr(key, w1, w2, alpha=3.0)
    save_file(state, tmp_path / "lora.safetensors")
    pipeline_class, build = TINY["z"]
    transformer = build()
    (a, b, scale) = load_lora(tmp_path, transformer, pipeline_class)[Z_Q]
    assert len(a) == rank
    close(scale * b @ a, factor * product)
    assert lora_parameters(tmp_path, transformer, pipeline_class) == (32 * rank, "LoKr")


@pytest.mark.parametrize("rank", [2, 5])  # of which the product's, 4 and 25, is smaller and larger than the layer
def test_a_loha_is_the_product_of_two_products_entry_by_entry(rank, tmp_path):
    generator, key = torch.Generator().manual_seed(0), f"transformer.{QUERY}"
    shapes = {"w1_a": (16, rank), "w1_b": (rank, 16), "w2_a": (16, rank), "w2_b": (rank, 16)}
    parts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state = {f"{key}.hada_{name}": value for name, value in parts.items()} | {f"{key}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "lora.safetensors")
    (a, b, scale) = load_lora(tmp_path, small_sd3(), SD3)[QUERY]
    close(scale * b @ a, (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"]) / rank)
    assert len(a) == min(16, rank * rank)


@pytest.mark.parametrize("layer", ["attn.to_q", "ff.net.0.proj", "ff.net.2"])
def test_a_full_change_of_a_weight_is_taken_whole(layer, tmp_path):
    name, transformer = f"transformer_blocks.0.{layer}", small_sd3()
    change = torch.randn(transformer.get_submodule(name).weight.shape)
    save_file({f"diffusion_model.{name}.diff": change}, tmp_path / "lora.safetensors")
    expected = transformer.get_submodule(name).weight + 0.5 * change
    merged = merge_into(transformer, load_lora(tmp_path, transformer, SD3, 0.5))
    close(merged.get_submodule(name).weight, expected)


def dora(model, settings=CONFIG):
    """PEFT's own DoRA on a model, with random factors and magnitudes."""
    model = get_peft_model(model, LoraConfig(**settings, use_dora=True))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
            elif "magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def test_a_dora_of_peft_gives_the_weights_that_peft_gives_it(tmp_path):
    model = dora(small_sd3())
    model.save_pretrained(tmp_path / "lora")
    expected = dict(model.merge_and_unload().named_parameters())
    for transformer in (small_sd3(), small_sd3().to("meta")):
        base = of_tensors(small_sd3().state_dict()) if transformer.device.type == "meta" else None
        lora = load_lora(tmp_path / "lora", transformer, SD3, base=base)
        result = merge_into(small_sd3(), lora)
        for name, parameter in result.named_parameters():
            close(parameter, expected[name])
    assert lora_parameters(tmp_path / "lora", small_sd3(), SD3) == (
        sum(map(numbers, lora.values())),
        "LoRA of DoRA's kind",
    )
    with pytest.raises(UserError, match="is a DoRA, whose change depends on the base's own weights; these are not at"):
        load_lora(tmp_path / "lora", small_sd3().to("meta"), SD3)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["LoRA", "LoKr"])
def test_a_dora_of_lycoris_on_a_fused_layer(axis, kind, tmp_path):
    """m (W + D) / |W + D|, of rows or of columns of the whole fused weight, worked out here in float64."""
    pipeline_class, build = TINY["flux2"]
    transformer, key = build(), "lora_unet_double_blocks_1_img_attn_qkv"
    layers = [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"]
    weight = torch.cat([transformer.get_submodule(layer).weight for layer in layers]).double().detach()
    if kind == "LoRA":
        state = factors({key: (16, 48)}, alpha=2.0)
        change = 0.5 * state[f"{key}.lora_up.weight"].double() @ state[f"{key}.lora_down.weight"].double()
    else:
        state, product = lokr(key, (6, 4), (8, 4))
        change = product.double()
    turned = weight + change
    norm = turned.norm(dim=1 - axis, keepdim=True)
    magnitude = norm * (0.5 + torch.rand(norm.shape, generator=torch.Generator().manual_seed(3)))
    save_file(state | {f"{key}.dora_scale": magnitude.float()}, tmp_path / "lora.safetensors")
    lora = load_lora(tmp_path, transformer, pipeline_class, scale=0.7)
    expected = 0.7 * (turned * magnitude / norm - weight)
    for layer, rows in zip(layers, expected.chunk(3), strict=True):
        a, b, scale = lora[layer]
        close(scale * b @ a, rows.float())


@pytest.mark.parametrize("kind", ["LoKr", "LoKr of factors", "LoHa"])
def test_other_adapters_of_peft_give_the_weights_that_peft_gives_them(kind, tmp_path):
    settings = {"r": 3, "alpha": 6, "target_modules": ["to_q", "net.2"], "init_weights": False}
    settings |= {"rank_pattern": {"net.2": 2}, "alpha_pattern": {"net.2": 5}}
    if kind == "LoHa":
        config = LoHaConfig(**settings)
    else:
        config = LoKrConfig(**settings, decompose_both="factors" in kind, decompose_factor=4)
    torch.manual_seed(1)
    model = get_peft_model(small_sd3(width=64), config)
    model.save_pretrained(tmp_path)
    expected = dict(model.merge_and_unload().named_parameters())
    result = merge_into(small_sd3(width=64), load_lora(tmp_path, small_sd3(width=64), SD3))
    for name, parameter in result.named_parameters():
        close(parameter, expected[name])


NORMS = {
    "flux": ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    "flux2": ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    "sd3": ("joint_blocks.1.context_block.adaLN_modulation.1", "transformer_blocks.1.norm1_context.linear"),
}


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_norms_whose_halves_diffusers_swaps_are_swapped(family, prefix, tmp_path):
    """As diffusers does with the weights themselves; its LoRA converter for FLUX.2 forgets it."""
    old, new = NORMS[family]
    key = prefix + (old if prefix.endswith(".") else old.replace(".", "_"))
    state = factors({key: (16, 32)})
    save_file(state, tmp_path / "lora.safetensors")
    pipeline_class, build = TINY[family]
    lora = load_lora(tmp_path, build(), pipeline_class)
    assert [*lora] == [new]
    a, b, scale = lora[new]
    shift, scaling = (state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"]).chunk(2)
    close(scale * b @ a, torch.cat([scaling, shift]))


PEFT_STYLE = {"style": ("lora_A", "lora_B")}
SINGLE = "single_transformer_blocks.1"
SPLIT = [f"{SINGLE}.attn.to_{x}" for x in "qkv"]

# {trainer: (family, {name in its files: (in, out)}, how it writes, the layers here)}
TRAINERS = {
    "ai-toolkit, FLUX.2": ("flux2", {"diffusion_model.single_blocks.1.linear1": (16, 144)}, PEFT_STYLE,
                           [f"{SINGLE}.attn.to_qkv_mlp_proj"]),
    "musubi, Qwen-Image": ("qwen", {"lora_unet_transformer_blocks_0_img_mlp_net_0_proj": (16, 64)}, {"alpha": 1.0},
                           ["transformer_blocks.0.img_mlp.net.0.proj"]),
    "musubi, Z-Image": ("z", {"lora_unet_layers_1_attention_to_out_0": (16, 16)}, {"alpha": 1.0},
                        ["layers.1.attention.to_out.0"]),
    "OneTrainer, FLUX": ("flux", {"lora_transformer_transformer_blocks_0_ff_net_0_proj": (16, 64)}, {"alpha": 1.0},
                         ["transformer_blocks.0.ff.net.0.proj"]),
    "OneTrainer, dotted": ("flux", {f"transformer.{SINGLE}.proj_mlp": (16, 64)}, {"alpha": 1.0},
                           [f"{SINGLE}.proj_mlp"]),
    "OneTrainer, OMI": ("flux", {f"transformer.single_blocks.1.linear1.{i}": (16, 16) for i in range(3)},
                        {"alpha": 1.0, "rank": 1}, SPLIT),
    "OneTrainer, OMI of SD3": ("sd3", {"transformer.joint_blocks.0.context_block.attn.qkv.1": (16, 16)}, {"alpha": 1.0},
                               ["transformer_blocks.0.attn.add_k_proj"]),
    "flat names behind lora_": ("sd3", {"lora_transformer_blocks_0_attn_to_k": (16, 16)}, {"alpha": 1.0},
                                ["transformer_blocks.0.attn.to_k"]),
    "X-Labs, single blocks": ("flux", {"single_blocks.1.processor.qkv_lora": (16, 48)}, {"style": ("down", "up")},
                              SPLIT),
    "kohya, fused linear1": ("flux", {"lora_unet_single_blocks_1_linear1": (16, 112)}, {"alpha": 1.0},
                             [*SPLIT, f"{SINGLE}.proj_mlp"]),
    "kohya, SD3": ("sd3", {"lora_unet_joint_blocks_0_x_block_attn2_qkv": (16, 48)}, {"alpha": 1.0},
                   [f"transformer_blocks.0.attn2.to_{x}" for x in "qkv"]),
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_trainers_write_is_read_to_the_last_key(trainer, tmp_path):
    family, shapes, style, layers = TRAINERS[trainer]
    pipeline_class, build = TINY[family]
    state = factors(shapes, **style)
    save_file(state, tmp_path / "lora.safetensors")
    lora = load_lora(tmp_path, build(), pipeline_class)
    assert [*lora] == layers
    change = torch.cat([scale * b @ a for a, b, scale in lora.values()])
    expected = []
    for name in shapes:
        down, up = (value for key, value in state.items() if key.startswith(f"{name}.") and key.endswith("weight"))
        alpha = state[f"{name}.alpha"] / len(down) if f"{name}.alpha" in state else 1.0
        expected.append(alpha * up @ down)
    close(change, torch.cat(expected))


def test_a_lokr_of_a_layout_that_diffusers_converts_is_taken(tmp_path):
    # of FLUX's own fused layer, whose LoKr diffusers itself cannot split
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    state, product = lokr(key, (6, 4), (8, 4))
    save_file(state, tmp_path / "lora.safetensors")
    pipeline_class, build = TINY["flux2"]
    lora = load_lora(tmp_path, build(), pipeline_class)
    for x, rows in zip("qkv", product.chunk(3), strict=True):
        a, b, scale = lora[f"transformer_blocks.0.attn.to_{x}"]
        close(scale * b @ a, rows)


def test_a_file_that_changes_nothing_is_said(tmp_path):
    state = ab(GOOD)
    save_file(state | {f"{Q}.lora_B.weight": torch.zeros(16, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"lora.safetensors: changes nothing: in every layer a factor or alpha is zero"):
        lora_parameters(tmp_path, small_sd3(), SD3)
    save_file(lokr(Q, (4, 4), (4, 4))[0] | {f"{Q}.lokr_w1": torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="changes nothing"):
        lora_parameters(tmp_path, small_sd3(), SD3)
    other = ab({"transformer.transformer_blocks.1.attn.to_q": (16, 16)})
    save_file(state | {f"{Q}.lora_B.weight": torch.zeros(16, 4)} | other, tmp_path / "lora.safetensors")
    assert lora_parameters(tmp_path, small_sd3(), SD3)[1] == "LoRA, without a change in 1 of 2 layers"


@pytest.mark.parametrize(
    ("metadata", "config", "named"),
    [
        ({"base_model": "org/model"}, None, "org/model"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, None, "flux-1-dev/lora"),
        ({"ss_base_model_version": "flux1"}, None, "flux1"),
        ({}, {"base_model_name_or_path": "org/other"}, "org/other"),
        ({}, {"base_model_name_or_path": "/home/me/model"}, None),
        ({}, {}, None),
    ],
)
def test_a_file_names_the_base_that_it_was_trained_on(metadata, config, named, tmp_path):
    name = "lora" if config is None else "adapter_model"
    save_file(ab(GOOD), tmp_path / f"{name}.safetensors", metadata=metadata)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert trained_for(tmp_path) == named


def test_a_change_that_is_zero_may_be_left_out(tmp_path):
    state = factors({"lora_unet_double_blocks_0_img_attn_proj": (16, 16)})
    state["lora_unet_double_blocks_0_img_attn_proj.diff_b"] = torch.zeros(16)
    save_file(state, tmp_path / "lora.safetensors")
    assert [*load_lora(tmp_path, TINY["flux"][1](), diffusers.FluxPipeline)] == ["transformer_blocks.0.attn.to_out.0"]


def test_a_file_that_is_not_there_or_broken_is_an_error_with_its_path(tmp_path):
    def refused(path, message):
        with pytest.raises(UserError, match=message) as error:
            load_lora(path, small_sd3(), SD3)
        assert str(path) in str(error.value)

    refused(tmp_path / "none", "no LoRA there")
    refused(tmp_path, "found none; give a LoRA's file, or the folder that holds it")
    (tmp_path / "checkpoint").mkdir()
    save_file(ab(GOOD), tmp_path / "checkpoint" / "pytorch_lora_weights.safetensors")
    refused(tmp_path, "found none; its folders have checkpoint/pytorch_lora_weights.safetensors: name one of these")
    refused(tmp_path / "checkpiont", "no LoRA there, .*; did you mean '.*/checkpoint'")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "found none; it is a model's folder: give it as the source's weights")
    (tmp_path / "config.json").unlink()
    (tmp_path / "lora.bin").write_bytes(b"x")
    refused(tmp_path / "lora.bin", "must be a safetensors file")
    save_file(ab(GOOD), tmp_path / "one.safetensors")
    whole = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(whole[:-100])
    refused(tmp_path, "found one.safetensors, two.safetensors; name the file itself")
    refused(tmp_path / "two.safetensors", "cannot be read as safetensors")
    (tmp_path / "two.safetensors").write_bytes(b"")
    refused(tmp_path / "two.safetensors", "cannot be read as safetensors: it is empty, of 0 bytes; copy it again")
    (tmp_path / "two.safetensors").write_bytes(whole[:20])
    refused(tmp_path / "two.safetensors", "cut off within its header")
    (tmp_path / "two.safetensors").write_bytes(b"<!DOCTYPE html><html>Please log in</html>")
    refused(tmp_path / "two.safetensors", "is a web page and no safetensors file")
    torch.save({}, tmp_path / "two.safetensors")
    refused(tmp_path / "two.safetensors", "pickled weights under a .safetensors name")
    (tmp_path / "two.safetensors").write_text(f"version https://git-lfs.github.com/spec/v1\noid {'a' * 64}\nsize 97\n")
    refused(tmp_path / "two.safetensors", "Git LFS pointer of .* in place of the file of 97 bytes.*git lfs pull")
    save_file({}, tmp_path / "two.safetensors")
    refused(tmp_path / "two.safetensors", "holds no tensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no adapter_config.json"),
        ("{", "cannot be read as JSON"),
        ({"peft_type": "BOFT"}, "of whose kinds .*LOKR.* are taken; make it a LoRA by peft.save_as_lora"),
        ({"r": 8}, f"gives {QUERY} rank 8, its factors have 4"),
        ({"r": 4, "init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ("[" * 3000 + "]" * 3000, "cannot be read as JSON: it nests too deep"),
        ("[]", "cannot be read as JSON: it is no JSON object"),
        ({"r": "4"}, "has r '4', which is no number"),
        ({"r": 4, "lora_alpha": None}, "has lora_alpha None, which is no number"),
        ({"r": 4, "lora_alpha": float("nan")}, "has lora_alpha nan, which is no number"),
        ({"r": 0}, "gives a rank of 0"),
        ({"r": 4, "alpha_pattern": ["to_q"]}, "has in alpha_pattern what are no numbers by patterns"),
        ({"r": 4, "rank_pattern": {"to_q": "4"}}, "has in rank_pattern what are no numbers by patterns"),
        ({"r": 4, "rank_pattern": {"to_q(": 4}}, r"has in rank_pattern 'to_q\(', which is no pattern"),
    ],
)
def test_a_peft_folder_whose_configuration_does_not_fit_is_an_error(config, message, tmp_path):
    save_file(ab({f"base_model.model.{QUERY}": (16, 16)}), tmp_path / "adapter_model.safetensors")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_lora(tmp_path, small_sd3(), SD3)
    assert str(tmp_path) in str(error.value)


def test_alphas_and_a_configuration_together_are_an_error(tmp_path):
    trained = small_sd3()
    trained.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    trained.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 4})}
    save_file(load_file(file) | {f"{QUERY}.alpha": torch.ones(())}, file, metadata=metadata)
    with pytest.raises(UserError, match=r"has alphas .* and a PEFT configuration too"):
        load_lora(tmp_path, small_sd3(), SD3)
