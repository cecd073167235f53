"""LoRA teachers: files of each layout give diffusers' own weights, a shared batch each merged model's velocity."""

import json
from copy import deepcopy

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_sd3 import save_tiny
from torch import nn

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import hard
from danceopd.models.backbones import sd3
from danceopd.models.lora_algebra import combine, merge_into
from danceopd.models.lora_files import load_lora
from danceopd.models.shared_base import SharedBase
from danceopd.support.errors import UserError

SD3 = diffusers.StableDiffusion3Pipeline
HEADS = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
TINY = {
    "sd3": (SD3, lambda: small_sd3()),
    "flux": (
        diffusers.FluxPipeline,
        lambda: diffusers.FluxTransformer2DModel(
            **HEADS, num_single_layers=2, in_channels=4, joint_attention_dim=12, pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4), guidance_embeds=True,
        ),
    ),
    "flux2": (
        diffusers.Flux2Pipeline,
        lambda: diffusers.Flux2Transformer2DModel(
            **HEADS, num_single_layers=2, in_channels=4, joint_attention_dim=12, timestep_guidance_channels=8,
            axes_dims_rope=(2, 2, 2, 2),
        ),
    ),
    "qwen": (
        diffusers.QwenImagePipeline,
        lambda: diffusers.QwenImageTransformer2DModel(
            **HEADS, in_channels=16, out_channels=4, joint_attention_dim=16, axes_dims_rope=(4, 2, 2)
        ),
    ),
    "z": (
        diffusers.ZImagePipeline,
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 2, 2], axes_lens=[64, 16, 16],
        ),
    ),
}  # fmt: skip


def small_sd3(width=16, layers=2, **changes):
    torch.manual_seed(0)
    sizes = {"attention_head_dim": width // 2, "num_attention_heads": 2, "caption_projection_dim": width}
    shapes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 12}
    rest = {"pooled_projection_dim": 8, "pos_embed_max_size": 16, "dual_attention_layers": (0,), "num_layers": layers}
    return diffusers.SD3Transformer2DModel(**sizes | shapes | rest | changes).eval()


def linears(transformer, ends):
    return {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and n.endswith(ends)}


def random_lora(transformer, ends, rank, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, linear in linears(transformer, ends).items():
        a = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        lora[name] = (a, torch.randn(linear.out_features, rank, generator=generator) * 0.2, scale)
    return lora


def factors(shapes, rank=4, style=("lora_down", "lora_up"), alpha=None, seed=0):
    """A state dict by name: {name: (in, out)}."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for i, (name, (width, out)) in enumerate(shapes.items()):
        state[f"{name}.{style[0]}.weight"] = torch.randn(rank, width, generator=generator)
        state[f"{name}.{style[1]}.weight"] = torch.randn(out, rank, generator=generator)
        if alpha:
            state[f"{name}.alpha"] = torch.tensor(alpha + i)
    return state


def prompts(n, length=5, wide=12, pooled=8):
    generator = torch.Generator().manual_seed(5)
    prompt = {
        "prompt_embeds": torch.randn(n, length, wide, generator=generator),
        "pooled_prompt_embeds": torch.randn(n, pooled, generator=generator),
    }
    return Conditioning(prompt, None, torch.zeros(n, dtype=torch.bool))


def batch(n, size=8):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 4, size, size, generator=generator), torch.linspace(0.1, 1, n)


def close(got, expected, tolerance=1e-5):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


# ------------------------------------------------------------------------------------------------ layouts


def diffusers_deltas(transformer, path, pipeline_class):
    """scale B A by module as diffusers loads the file into the transformer, without load_lora's help."""
    alphas = {"return_alphas": True} if pipeline_class is diffusers.FluxPipeline else {}
    state, *rest = pipeline_class.lora_state_dict(str(path), use_safetensors=True, return_lora_metadata=True, **alphas)
    metadata, network = rest[-1], rest[0] if alphas else None
    model = deepcopy(transformer)
    model.load_lora_adapter(state, network_alphas=network, metadata=metadata, prefix="transformer", adapter_name="x")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    return {name: layer.get_delta_weight("x") for name, layer in layers.items()}


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


def test_combined_loras_are_their_sum():
    transformer = small_sd3()
    one = random_lora(transformer, ("to_q", "net.2"), 2, 1, scale=0.7)
    two = random_lora(transformer, ("to_q", "to_v"), 3, 2, scale=-1.5)
    both = combine([one, two])
    assert both.keys() == one.keys() | two.keys()
    once, twice = merge_into(deepcopy(transformer), both), merge_into(merge_into(deepcopy(transformer), one), two)
    for got, expected in zip(once.parameters(), twice.parameters(), strict=True):
        close(got, expected)


# ------------------------------------------------------------------------------------------------ sharing

# Different ranks and layers; each has layers that no other touches, those that see [B, in] among them.
TARGETS = [
    (("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "add_q_proj"), 4, 1.0),
    (("ff.net.0.proj", "ff.net.2", "attn.to_q", "attn2.to_v"), 2, 0.5),
    (("norm1.linear", "norm_out.linear", "proj_out", "context_embedder"), 8, 2.0),
    (("timestep_embedder.linear_1", "text_embedder.linear_2", "attn.to_q", "ff.net.2"), 3, -1.0),
]


def four(transformer):
    return [random_lora(transformer, ends, rank, m, scale) for m, (ends, rank, scale) in enumerate(TARGETS)]


@torch.no_grad()
def test_a_mixed_batch_equals_each_merged_model_alone():
    transformer = small_sd3()
    loras = four(transformer)
    models = [merge_into(deepcopy(transformer), lora) for lora in loras] + [deepcopy(transformer)]
    parameters = dict(transformer.named_parameters())
    shared = SharedBase(transformer, loras, sd3.velocity)
    assert {n: p.data_ptr() for n, p in transformer.named_parameters()} == {
        n: p.data_ptr() for n, p in parameters.items()
    }
    adapter = torch.tensor([2, 0, -1, 3, 1, 1, 0])
    (latents, sigma), conditioning = batch(7), prompts(7)
    got = shared(latents, sigma, conditioning, adapter)
    for i, m in enumerate(adapter):
        row = slice(i, i + 1)
        expected = sd3.velocity(models[m], latents[row], sigma[row], conditioning[row].prompt)
        close(got[row], expected)
        close(shared.field(int(m))(latents[row], sigma[row], conditioning[row]), expected)
    expected = hard([shared.field(m) for m in range(-1, 4)], adapter + 1)(latents, sigma, conditioning)
    close(got, expected)


@torch.no_grad()
def test_each_teacher_changes_the_velocity():
    transformer = small_sd3()
    shared = SharedBase(transformer, four(transformer), sd3.velocity)
    (latents, sigma), conditioning = batch(2), prompts(2)
    answers = torch.stack([shared.field(m)(latents, sigma, conditioning) for m in range(-1, 4)])
    assert torch.pdist(answers.flatten(1)).min() > 0.01


def test_the_base_is_frozen_and_a_gradient_reaches_the_latents():
    transformer = small_sd3()
    shared = SharedBase(transformer, four(transformer), sd3.velocity)
    (latents, sigma), conditioning = batch(4), prompts(4)
    latents.requires_grad_()
    shared(latents, sigma, conditioning, torch.arange(4)).square().sum().backward()
    assert latents.grad.abs().min() > 0
    assert not any(p.requires_grad for p in transformer.parameters())


@torch.no_grad()
def test_in_bfloat16_the_adapters_follow_the_base():
    transformer = small_sd3().bfloat16()
    shared = SharedBase(transformer, four(transformer), sd3.velocity)
    exact = small_sd3()
    reference = SharedBase(exact, four(exact), sd3.velocity)
    (latents, sigma), conditioning, adapter = batch(4), prompts(4), torch.arange(4)
    got, expected = (s(latents, sigma, conditioning, adapter) for s in (shared, reference))
    close(got, expected, 0.05)


def storages(transformer):
    tensors = [*transformer.parameters(), *transformer.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_four_teachers_take_hardly_more_memory_than_one():
    # Rank 4 of width 192 is as large a part as rank 32 of SD3.5-medium's 1536.
    transformer = small_sd3(width=192, layers=4)
    alone = storages(transformer)
    loras = [random_lora(transformer, sd3.LORA_TARGETS, 4, seed) for seed in range(4)]
    SharedBase(transformer, loras, sd3.velocity)
    ratio = storages(transformer) / alone
    print(f"4 LoRA teachers: {ratio:.3f} of one model's memory")
    assert ratio <= 1.15


@torch.no_grad()
def test_samples_with_and_without_a_source_are_asked_apart():
    def velocity(transformer, latents, sigma, prompt, sources=(), guidance=None):
        change = transformer.layer(latents + prompt)
        return change + sum((10 * s for s in sources), torch.zeros_like(change))

    transformer = nn.ModuleDict({"layer": nn.Linear(3, 3)})
    transformer.layer.weight.data, transformer.layer.bias.data = torch.eye(3), torch.zeros(3)
    loras = [{"layer": (torch.eye(3), torch.eye(3), scale)} for scale in (1.0, 2.0)]
    shared = SharedBase(transformer, loras, lambda t, *rest: velocity(_Dotted(t), *rest))
    conditioning = Conditioning(torch.zeros(4, 3), (torch.ones(4, 3),), torch.tensor([True, False, False, True]))
    adapter = torch.tensor([0, 1, -1, 1])
    got = shared(torch.ones(4, 3), torch.ones(4), conditioning, adapter)
    assert torch.equal(got, torch.tensor([12.0, 3, 1, 13])[:, None].expand(4, 3))
    got = shared.field(1)(torch.ones(4, 3), torch.ones(4), conditioning)
    assert torch.equal(got, torch.tensor([13.0, 3, 3, 13])[:, None].expand(4, 3))


class _Dotted:
    def __init__(self, modules):
        self.layer = modules["layer"]


@torch.no_grad()
def test_qwen_edit_whose_times_come_twice_is_routed():
    from danceopd.models.backbones import qwen_image

    torch.manual_seed(0)
    config = {**HEADS, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 16, "axes_dims_rope": (4, 2, 2)}
    transformer = diffusers.QwenImageTransformer2DModel(**config, zero_cond_t=True).eval()
    ends = [("img_mod.1", "timestep_embedder.linear_1"), ("to_q", "txt_mod.1"), ("img_in", "norm_out.linear")]
    loras = [random_lora(transformer, e, 2, m) for m, e in enumerate(ends)]
    models = [merge_into(deepcopy(transformer), lora) for lora in loras]
    shared = SharedBase(transformer, loras, qwen_image.velocity)
    (latents, sigma), adapter = batch(3), torch.tensor([1, 0, 2])
    prompt = {"prompt_embeds": torch.randn(3, 5, 16), "prompt_mask": torch.ones(3, 5, dtype=torch.bool)}
    conditioning = Conditioning(prompt, (torch.randn(3, 4, 6, 4),), torch.ones(3, dtype=torch.bool))
    got = shared(latents, sigma, conditioning, adapter)
    for i, m in enumerate(adapter):
        c, row = conditioning[i : i + 1], slice(i, i + 1)
        close(got[row], qwen_image.velocity(models[m], latents[row], sigma[row], c.prompt, c.source))


@torch.no_grad()
def test_z_image_shares_its_layers_but_not_its_embedder_of_joined_tokens():
    from danceopd.models.backbones import z_image

    torch.manual_seed(0)
    transformer = TINY["z"][1]().eval()
    for parameter in transformer.parameters():  # some are empty until a checkpoint is read
        parameter.data = torch.randn_like(parameter) * 0.2
    base = deepcopy(transformer)
    layers = [random_lora(transformer, e, 2, m) for m, e in enumerate([("to_q", "w2"), ("to_v", "adaLN_modulation.0")])]
    models = [merge_into(deepcopy(transformer), lora) for lora in layers]
    embedder = random_lora(transformer, ("all_x_embedder.2-1",), 2, 3)
    alone = merge_into(deepcopy(transformer), embedder)
    shared = SharedBase(transformer, [*layers, embedder], z_image.velocity)
    (latents, sigma), adapter = batch(2), torch.tensor([1, 0])
    prompt = {
        "prompt_embeds": torch.randn(2, 5, 16),
        "prompt_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
    }
    conditioning = Conditioning(prompt, None, torch.zeros(2, dtype=torch.bool))
    close(shared.field(2)(latents, sigma, conditioning), z_image.velocity(alone, latents, sigma, prompt))
    with pytest.raises(ValueError, match=r"all_x_embedder.2-1: the first axis .* is not the batch of 1"):
        shared(latents, sigma, conditioning, adapter)
    shared = SharedBase(base, layers, z_image.velocity)
    got = shared(latents, sigma, conditioning, adapter)
    for i, m in enumerate(adapter):
        row = slice(i, i + 1)
        close(got[row], z_image.velocity(models[m], latents[row], sigma[row], conditioning[row].prompt))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (torch.tensor([0, 4]), "one of 4 teachers"),
        (torch.tensor([0, -2]), "one of 4 teachers"),
        (torch.tensor([0]), r"int64 \[2\]"),
        (torch.tensor([0, 1], dtype=torch.int32), "int32"),
    ],
)
def test_an_adapter_that_is_not_there_is_refused(adapter, message):
    transformer = small_sd3()
    shared = SharedBase(transformer, four(transformer), sd3.velocity)
    with pytest.raises(ValueError, match=message):
        shared(*batch(2), prompts(2), adapter)


def test_a_transformer_is_shared_once_and_by_its_own_loras():
    transformer = small_sd3()
    SharedBase(transformer, four(transformer), sd3.velocity)
    with pytest.raises(ValueError, match="all its LoRAs at once"):
        SharedBase(transformer, four(transformer), sd3.velocity)
    with pytest.raises(UserError, match=r"SD3Transformer2DModel has no layer transformer_blocks.7"):
        SharedBase(small_sd3(), [random_lora(small_sd3(layers=8), "7.attn.to_q", 2, 0)], sd3.velocity)


# ------------------------------------------------------------------------------------------------- errors

Q, QUERY = "transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"
GOOD = {Q: (16, 16)}


def ab(shapes):
    return factors(shapes, style=("lora_A", "lora_B"))


@pytest.mark.parametrize(
    ("family", "state", "message"),
    [
        ("sd3", ab(GOOD) | {f"{Q}.lora_magnitude_vector": torch.ones(16)}, "lora_magnitude_vector would be left out"),
        ("sd3", ab(GOOD) | {f"{Q}.lora_B.bias": torch.ones(16)}, "to_q.lora_B.bias would"),
        ("sd3", ab(GOOD) | {f"{Q}.diff": torch.ones(16, 16)}, "to_q.diff would"),
        ("sd3", ab(GOOD) | ab({"text_encoder.layers.0.fc1": (8, 8)}), r"text_encoder.*fc1.*without text encoders"),
        ("sd3", ab(GOOD) | ab({"transformer.transformer_blocks.9.attn.to_q": (16, 16)}), "blocks.9.attn.to_q.lora_A"),
        ("sd3", ab(GOOD) | ab({"transformer.pos_embed.proj": (16, 16)}), "pos_embed.proj.lora_A"),
        ("sd3", ab({Q: (24, 24)}), r"to_q is 16 -> 16 .* \[4, 24\] and \[24, 4\]; it was trained for another"),
        ("sd3", {f"{Q}.lora_A.weight": torch.ones(4, 16)}, "only one of its two factors"),
        ("sd3", factors({"lora_unet_joint_blocks_0_x_block_attn_proj": (16, 16)}), "cannot take all of this LoRA"),
        ("sd3", ab(GOOD) | {f"{Q}.alpha": torch.ones(2)}, "no number beside a pair"),
        ("sd3", ab(GOOD) | {"transformer.x.alpha": torch.ones(())}, "transformer.x.alpha: no number beside a pair"),
        ("sd3", ab(GOOD) | {f"{Q}.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}, "not floating point"),
        # what diffusers' converters leave out in silence
        ("flux", factors({"lora_unet_double_blocks_0_img_attn_proj": (16, 16)})
         | {"lora_unet_double_blocks_0_img_attn_proj.dora_scale": torch.ones(16, 1)}, "dora_scale would be left out"),
        ("flux", factors({"lora_unet_double_blocks_0_img_attn_proj": (16, 16),
                          "text_encoders.t5xxl.transformer.block": (8, 8)}), "t5xxl.* would be left out"),
        ("flux", factors({"lora_unet_double_blocks_0_img_attn_proj": (16, 16)})
         | {"lora_unet_double_blocks_0_img_attn_proj.diff_b": torch.ones(16)}, "diff_b would be left out"),
        ("flux", factors({"transformer.transformer_blocks.0.attn.to_q": (16, 16), "another.layer": (16, 16)}),
         "another.layer.* would be left out"),
        ("flux", factors({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 8),
                          "lora_unet_double_blocks_0_img_attn_proj": (16, 16)}, alpha=2.0),
         "text_encoder.*would be left out"),
        ("flux", factors({"lora_unet_double_blocks_44_img_attn_proj": (16, 16)}), "cannot convert this LoRA for Flux"),
        ("flux", factors({"lora_unet_double_blocks_7_img_attn_proj": (16, 16)}), r"blocks\.7\.attn\.to_out"),
        ("qwen", ab({"diffusion_model.transformer_blocks.0.attn.to_q": (16, 16)})
         | {"diffusion_model.norm.diff": torch.ones(3)}, "cannot convert this LoRA for QwenImagePipeline"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_taken_is_an_error(family, state, message, tmp_path):
    pipeline_class, build = TINY[family]
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message) as error:
        load_lora(tmp_path / "lora.safetensors", build(), pipeline_class)
    assert str(tmp_path / "lora.safetensors") in str(error.value)


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
    refused(tmp_path, "found none")
    (tmp_path / "lora.bin").write_bytes(b"x")
    refused(tmp_path / "lora.bin", "must be a safetensors file")
    save_file(ab(GOOD), tmp_path / "one.safetensors")
    whole = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(whole[:-100])
    refused(tmp_path, "found one.safetensors, two.safetensors; name the file itself")
    refused(tmp_path / "two.safetensors", "cannot be read as safetensors")
    (tmp_path / "two.safetensors").write_bytes(b"")
    refused(tmp_path / "two.safetensors", "cannot be read as safetensors")
    save_file({}, tmp_path / "two.safetensors")
    refused(tmp_path / "two.safetensors", "holds no tensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no adapter_config.json"),
        ("{", "cannot be read as JSON"),
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"r": 8}, f"gives {QUERY} rank 8, its factors have 4"),
        ({"r": 4, "init_lora_weights": "pissa_niter_4"}, "changes the base model"),
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
