"""FP8 for frozen networks: what is stored, what comes out, how it is loaded, and adapters upon it."""

import subprocess
import sys
from copy import deepcopy

import diffusers
import pytest
import torch
from kernel_device import devices
from model_runs import config_of
from released import CLASSES, MODELS
from safetensors.torch import load_file, save_file
from torch import nn

from danceopd.api import builder_of, examiner_of
from danceopd.config.reading import load_config
from danceopd.core.fields import routed
from danceopd.models.backbones import backbone_of, pipeline_class_of
from danceopd.models.fp8 import Fp8Linear, check_fp8, numbers, to_fp8
from danceopd.models.fp8_loading import load_fp8
from danceopd.models.lora_algebra import merge_into
from danceopd.models.lora_files import load_lora
from danceopd.models.shared_base import SharedBase
from danceopd.planning.dry_run import dry_run
from danceopd.planning.memory import count, nbytes
from danceopd.planning.models import examine
from danceopd.support.errors import UserError
from danceopd.training.assembly.build import build_model
from danceopd.world.files import SHIPPED, load_model

FP8 = {"training.base_precision": "fp8"}


def slow(*values):
    """Of make test-all: what another value covers in the default run."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def asked(config):
    """(parts, (latents, sigma, conditioning) of three samples)."""
    parts = build_model(config)
    group = parts.samples.groups[0]
    latents = torch.randn(3, *group.shape, generator=torch.Generator().manual_seed(1))
    return parts, (latents, torch.tensor([0.9, 0.5, 0.1]), group.data[0].condition([0, 1, 2], [False] * 3))


def fp8_names(network):
    return {name for name, module in network.named_modules() if getattr(module, "weight_scale", None) is not None}


def opened(network):
    """A copy whose FP8 layers are plain ones with the numbers that the codes stand for."""
    network = deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, Fp8Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.dtype)
            plain.weight.data, plain.bias = numbers(layer.weight, layer.weight_scale, layer.dtype), layer.bias
            network.set_submodule(name, plain)
    return network.requires_grad_(False)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


# ------------------------------------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("family", ["sd3", "flux", "klein", "qwen", "z"])
def test_the_blocks_linear_layers_and_nothing_else(places, family):
    backbone = backbone_of(places(family) / "model")
    network = backbone.load_transformer(places(family) / "model", torch.bfloat16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    to_fp8(network)
    blocks = [name for name, child in network.named_children() if isinstance(child, nn.ModuleList)]
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert fp8_names(network) == {name for name in linear if name.split(".")[0] in blocks}
    assert {name for name in linear if network.get_submodule(name).weight.dtype == torch.bfloat16}
    for name, value in network.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer not in fp8_names(network) or leaf == "bias":
            assert torch.equal(value, before[name])
        elif leaf == "weight":
            scale = network.get_submodule(layer).weight_scale
            assert (value.dtype, value.shape) == (torch.float8_e4m3fn, before[name].shape)
            assert torch.equal(scale, before[name].float().abs().amax(1, keepdim=True) / 448)
            assert relative(value.float() * scale, before[name]) < 0.04
    modulating = {name for name in fp8_names(network) if network.get_submodule(name).modulates}
    assert modulating == {name for name in fp8_names(network) if "norm" in name or "mod" in name.lower()}
    assert bool(modulating) == (family != "klein")


KNOWN = {name for name, (_, config, _) in MODELS.items() if config is not None}

OTHERS = ("flux.2-klein-9b", "flux.2-dev", "qwen-image")  # larger than others of their class, or slow to make


@pytest.mark.parametrize(
    "model", [*sorted(KNOWN - {"flux.1-kontext-dev", "qwen-image-edit-2509", *OTHERS}), *slow(*OTHERS)]
)
def test_the_released_transformers_shrink_to_little_more_than_half(model):
    family, config, _ = MODELS[model]
    with torch.device("meta"):
        network = getattr(diffusers, CLASSES[family])(**config).bfloat16()
    parameters, tables = count(network), sum(buffer.nbytes for buffer in network.buffers())
    to_fp8(network)
    assert count(network) == parameters
    assert nbytes(network) - tables < 0.53 * 2 * parameters
    assert nbytes(network) < 0.552 * (2 * parameters + tables)  # SD3.5's table of positions stays as it is


def test_a_layer_that_modulates_takes_its_input_as_it_is():
    linear = nn.Linear(64, 96).requires_grad_(False)
    x = torch.randn(5, 64)
    modulating, other = Fp8Linear(linear, True), Fp8Linear(linear, False)
    want = opened(nn.Sequential(modulating))(x)
    torch.testing.assert_close(modulating(x), want)
    assert 0.01 < relative(other(x), want) < 0.05  # the rounding of x alone
    assert other(x[:0]).shape == (0, 96)


@pytest.mark.parametrize("modulates", [False, True])
@pytest.mark.parametrize("device", [pytest.param(d, marks=pytest.mark.gpu) if d == "cuda" else d for d in devices()])
def test_under_autocast_the_product_is_autocasts(device, modulates):
    """As of nn.Linear: whatever comes in, where a card's FP8 product gives bfloat16 alone; its gradient comes back."""
    linear = nn.Linear(64, 96).requires_grad_(False).to(device)
    layer = Fp8Linear(linear, modulates)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(device, torch.bfloat16):
            got, empty = layer(x.to(dtype)), layer(x[:0].to(dtype))
        assert got.dtype == empty.dtype == torch.bfloat16
        assert relative(got.detach(), linear(x).detach()) < 0.05
        (gradient,) = torch.autograd.grad(got.float().square().sum(), x)
        want = 2 * got.detach().double() @ numbers(layer.weight, layer.weight_scale, torch.float64)
        assert gradient.dtype == torch.float32
        assert relative(gradient, want) < 0.01
    with torch.autocast(device, torch.bfloat16, enabled=False):
        assert layer(x).dtype == torch.float32


def test_gradients_pass_to_the_input_alone():
    layer = to_fp8(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 32)])})).blocks[0]
    x = torch.randn(2, 3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    want = 2 * layer(x).detach() @ numbers(layer.weight, layer.weight_scale, torch.float32)
    torch.testing.assert_close(x.grad, want)
    assert layer.bias.grad is None


def test_a_gpu_that_is_too_old_is_refused(monkeypatch):
    assert check_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, fits in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        if fits:
            assert check_fp8(torch.device("cuda"))
        else:
            with pytest.raises(UserError, match=r"compute capability 8.0 or later, Tesla T4 has 7.5; use int8"):
                check_fp8(torch.device("cuda"))


# -------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("name", ["t2i", "global", *slow("edit")])
def test_a_shipped_source_hardly_moves(name):
    from danceopd.world.sources import STAGES, training_batch

    network = load_model(SHIPPED / f"{name}.safetensors").requires_grad_(False)
    narrow = to_fp8(deepcopy(network))
    clean, conditioning = training_batch(
        {"t2i": "t2i"}.get(name, "global"),
        32,
        STAGES[name],
        network.config.text_length,
        torch.Generator().manual_seed(3),
    )
    for level in (1.0, 0.8, 0.3):
        sigma = torch.full((32,), level)
        states = (1 - level) * clean + level * torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            want, got = network(states, sigma, conditioning).flatten(1), narrow(states, sigma, conditioning).flatten(1)
        assert nn.functional.cosine_similarity(got, want).mean() > 0.999
        assert 0 < relative(got, want) < 0.04


def test_the_picture_worlds_sources_in_fp8(tmp_path):
    changes = [f"training.output_dir={tmp_path}", "capabilities.t2i.data.size=8", "capabilities.edit.data.size=8"]
    plain, narrow = (
        load_config("configs/demo.yaml", [*changes, *extra]) for extra in ([], ["training.base_precision=fp8"])
    )
    parts = builder_of(narrow)(narrow)
    assert [len(fp8_names(network)) for network in parts.fields] == [25, 25]
    assert not fp8_names(parts.student)
    plans = tuple(dry_run(config, examiner_of(config)) for config in (plain, narrow))
    assert [plan.problems for plan in plans] == [[], []]
    assert plans[1].memory["source weights"][0] == sum(map(nbytes, parts.fields))
    assert plans[1].memory["source weights"][0] < 0.55 * plans[0].memory["source weights"][0]
    assert {k: v for k, v in plans[0].memory.items() if "source" not in k} == {
        k: v for k, v in plans[1].memory.items() if "source" not in k
    }
    with pytest.raises(UserError, match=r"training.base_precision: is for a model's"):
        load_config("configs/demo.yaml", [*changes, "training.base_precision=int8"])


@pytest.mark.parametrize("family", ["flux", *slow("sd3", "klein", "qwen", "z")])
def test_a_run_on_fp8(places, family):
    """LoRA teachers and a student on the base, and a teacher of its own weights: near the plain ones, and counted."""
    root = places(family)
    changes = {"sources.two": {"weights": str(root / "other"), "lora": [{"path": str(root / "two.safetensors")}]}}
    if family == "flux":
        changes |= {f"{key}.embedded_guidance": 3.5 for key in ("student", "sources.one", "sources.two")}
    plain, question = asked(config_of(root, **changes))
    question = *question[:2], question[2].embedding(3.5 if family == "flux" else None)
    parts, _ = asked(config_of(root, **changes, **FP8))
    for field, expected in zip(parts.fields, plain.fields, strict=True):
        assert 0 < relative(field(*question), expected(*question)) < 0.2  # random and tiny
    shared = parts.student._shared[0]
    torch.testing.assert_close(parts.student(*question), shared.field(-1)(*question))
    plan = dry_run(config_of(root, **changes, **FP8), examine)
    assert plan.problems == []
    adapters = sum(b.nbytes for name, b in shared.transformer.named_buffers() if name.endswith(("lora_a", "lora_b")))
    assert plan.memory["base weights"][0] == nbytes(shared.transformer) - adapters
    backbone = backbone_of(root / "model")
    own = load_fp8(root / "other", backbone, torch.float32)
    assert plan.memory["sources of their own weights"][0] == nbytes(own)


# -------------------------------------------------------------------------------------------------------- adapters


def test_adapters_on_an_fp8_base_are_not_rounded(places):
    """Their part is what it is on a plain base of the numbers that the codes stand for, where x is not rounded."""
    root = places("sd3")
    backbone, pipeline = backbone_of(root / "model"), pipeline_class_of(root / "model")
    base = load_fp8(root / "model", backbone, torch.float32)
    for module in base.modules():
        if isinstance(module, Fp8Linear):
            module.modulates = True  # none of them rounds its input
    loras = [load_lora(root / f"{name}.safetensors", base, pipeline, 20.0) for name in ("one", "two")]
    plain = [merge_into(opened(base), lora) for lora in loras]
    _, question = asked(config_of(root))
    shared = SharedBase(base, loras, backbone.velocity)
    route = torch.tensor([1, 0, 1])
    got = shared(*question, route)
    for i, m in enumerate(route.tolist()):
        want = SharedBase(plain[m], [], backbone.velocity).field(-1)(*question)[i]
        torch.testing.assert_close(got[i], want, rtol=1e-3, atol=1e-4)
    assert relative(got, shared.field(-1)(*question)) > 0.01


def test_a_mixed_batch_and_the_students_gradients_on_fp8(places):
    root = places("z")
    parts, question = asked(config_of(root, **FP8))
    route = torch.tensor([0, 1, 0])
    mixed = routed(parts.fields, route, *question).target()
    together = torch.stack([parts.fields[m](*question)[i].float() for i, m in enumerate(route)])
    torch.testing.assert_close(mixed, together, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for value in parts.student.parameters():
            value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
    gradients, kept = [], []
    for checkpointed in (False, True):
        if checkpointed:
            parts.student._shared[0].enable_gradient_checkpointing()
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t) or t, lambda t: t):
            velocity = parts.student(*question)
        kept.append({t.untyped_storage()._cdata for t in held if t.dtype == torch.float8_e4m3fn})
        parts.student.zero_grad()
        velocity.square().mean().backward()
        gradients.append({name: value.grad.clone() for name, value in parts.student.named_parameters()})
    own = {p.untyped_storage()._cdata for p in parts.student._shared[0].transformer.parameters()}
    assert kept[0]
    assert kept[0] <= own  # codes are kept as they lie
    assert all(value.abs().sum() > 0 for value in gradients[0].values())
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-7)


# --------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("sd3", torch.float32),
        *((family, torch.bfloat16) for family in ("sd3", "flux", "klein", "qwen", "z")),
        *(pytest.param(family, torch.float32, marks=pytest.mark.slow) for family in ("flux", "klein", "qwen", "z")),
    ],
)
def test_loaded_tensor_by_tensor_is_converted_whole(places, family, dtype):
    root = places(family)
    backbone = backbone_of(root / "model")
    loaded = load_fp8(root / "other", backbone, dtype)
    want = to_fp8(backbone.load_transformer(root / "other", dtype))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == want.state_dict().keys()
    for name, value in want.state_dict().items():
        assert value.dtype == loaded.state_dict()[name].dtype
        assert torch.equal(value.float(), loaded.state_dict()[name].float())
    buffers = dict(loaded.named_buffers())
    assert all(
        value.dtype == buffers[name].dtype and value.equal(buffers[name]) for name, value in want.named_buffers()
    )
    assert {k: v for k, v in want.config.items() if k != "_name_or_path"}.items() <= loaded.config.items()


def test_an_adapter_is_merged_before_the_rounding(places):
    root = places("flux")
    backbone = backbone_of(root / "model")
    other = backbone.load_transformer(root / "other")
    lora = load_lora(root / "one.safetensors", other, pipeline_class_of(root / "model"), 3.0)
    loaded = load_fp8(root / "other", backbone, torch.float32, lora=lora)
    want, without = to_fp8(merge_into(deepcopy(other), lora)), to_fp8(deepcopy(other))
    for name in lora:
        layers = [network.get_submodule(name) for network in (loaded, want, without)]
        got, expected, plain = (numbers(layer.weight, layer.weight_scale, torch.float32) for layer in layers)
        assert torch.equal(got, expected)
        assert not torch.equal(got, plain)


def test_a_single_file_and_a_streamed_teacher(places):
    root = places("klein")
    changes = {
        "sources.one": {"weights": str(root / "other.safetensors")},
        "sources.two": {"weights": str(root / "other")},
    }
    parts, question = asked(config_of(root, **changes, **FP8))
    one, two = (field(*question) for field in parts.fields)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    streamed, _ = asked(config_of(root, **changes, **FP8, **{"training.offload_sources": True}))
    torch.testing.assert_close(streamed.fields[1](*question), two, rtol=0, atol=0)


def test_folders_that_are_no_good(places, tmp_path):
    root = places("sd3")
    backbone = backbone_of(root / "model")
    with pytest.raises(UserError, match="no transformer in"):
        load_fp8(tmp_path, backbone, torch.float32)
    with pytest.raises(UserError, match="is not a transformer of this family"):
        load_fp8(places("z") / "other", backbone, torch.float32)
    folder = tmp_path / "one file"
    backbone.load_transformer(root / "other").save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    good = load_file(file)
    name = "transformer_blocks.0.attn.to_q.weight"
    save_file({key: value for key, value in good.items() if key != name}, file)
    with pytest.raises(UserError, match=f"lack 1 tensor, such as {name}"):
        load_fp8(folder, backbone, torch.float32)
    save_file(good | {name: good[name][:-1].clone()}, file)
    with pytest.raises(UserError, match=rf"{name} is \[15, 16\] there and \[16, 16\]"):
        load_fp8(folder, backbone, torch.float32)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="is cut off within its header, at 1000 bytes"):
        load_fp8(folder, backbone, torch.float32)


PEAK = """
import ctypes, gc, sys
from pathlib import Path

import torch

from danceopd.models.backbones import flux
from danceopd.models.fp8_loading import load_fp8


def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024


load_fp8(Path(sys.argv[1]), flux, torch.bfloat16)  # what the libraries take
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # such that no freed memory is used again unseen
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
network = load_fp8(Path(sys.argv[2]), flux, torch.bfloat16)
print(resident("VmHWM") - before, sum(t.nbytes for t in (*network.parameters(), *network.buffers())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_one_shard_beside_the_model(places, tmp_path):
    """50 M parameters, 100 MB in bf16, in shards of 20 MB."""
    config = {"num_layers": 1, "num_single_layers": 3, "attention_head_dim": 64, "num_attention_heads": 12}
    with torch.device("meta"):
        network = diffusers.FluxTransformer2DModel(**config, joint_attention_dim=64, axes_dims_rope=[16, 24, 24])
    parameters = count(network)
    assert parameters > 4.5e7
    torch.manual_seed(0)
    network = network.bfloat16().to_empty(device="cpu")
    noise = torch.randn(2**20).bfloat16()
    for parameter in network.parameters():
        repeats = -(-parameter.numel() // len(noise))
        parameter.data = noise.repeat(repeats)[: parameter.numel()].view(parameter.shape)
    network.save_pretrained(tmp_path, max_shard_size="20MB")
    del network
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(shards) >= 5
    argv = [sys.executable, "-c", PEAK, str(places("flux") / "model"), str(tmp_path)]  # where nothing else was freed
    peak, model = map(int, subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-2:])
    assert model < 0.55 * 2 * parameters
    slack = 16 * 2**20  # rows in float32 while their scales are found, and the allocator's
    assert model < peak < model + max(shards) + slack
    assert peak < 0.9 * 2 * parameters
