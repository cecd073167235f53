"""LoRA teachers on one base: a mixed batch has each merged model's velocity."""

from copy import deepcopy

import diffusers
import pytest
import torch
from small_loras import HEADS, TINY, batch, close, prompts, random_lora, small_sd3
from torch import nn

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import hard
from danceopd.models.backbones import sd3
from danceopd.models.lora_algebra import merge_into
from danceopd.models.shared_base import SharedBase
from danceopd.support.errors import UserError

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
        (torch.tensor([0, 4]), "one of 4 sources"),
        (torch.tensor([0, -2]), "one of 4 sources"),
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
