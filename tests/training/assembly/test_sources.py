"""Teachers of their own weights: folders, single files, host memory; and a frozen base of 8 bits under them all."""

import json
import shutil
import struct
from copy import deepcopy

import pytest
import torch
from model_runs import config_of
from original_layouts import as_flux2, as_sd3, as_z_image
from safetensors.torch import load_file, save_file
from torch import nn

from danceopd.api import distill
from danceopd.core.fields import routed
from danceopd.models import tensor_files
from danceopd.models.backbones import backbone_of, empty_transformer, pipeline_class_of
from danceopd.models.loading import check_transformer_file, load_transformer_file, stream_blocks
from danceopd.models.lora_algebra import merge_into
from danceopd.models.lora_files import load_lora
from danceopd.models.shared_base import SharedBase
from danceopd.planning.dry_run import dry_run
from danceopd.planning.memory import nbytes
from danceopd.planning.models import examine
from danceopd.support.errors import UserError
from danceopd.tools.model_report import measure_errors
from danceopd.training.assembly.build import build_model
from danceopd.training.checkpoints import load_newest


def asked(root, config=None):
    """(latents, sigma, conditioning) of three samples, for the fields of a run."""
    parts = build_model(config or config_of(root))
    group = parts.samples.groups[0]
    latents = torch.randn(3, *group.shape, generator=torch.Generator().manual_seed(1))
    return parts, (latents, torch.tensor([0.9, 0.5, 0.1]), group.data[0].condition([0, 1, 2], [False] * 3))


def teacher(root, weights, **changes):
    """The configuration of a run whose source two has weights of its own."""
    return config_of(root, **{"sources.two": {"weights": str(weights)}, **changes})


def velocity_of(root, transformer, question):
    latents, sigma, conditioning = question
    with torch.no_grad():
        return backbone_of(root / "model").velocity(transformer, latents, sigma, conditioning.prompt)


# -------------------------------------------------------------------------------------- folders and single files


def test_a_folder_of_shards_is_a_teacher(places):
    root = places("sd3")
    assert len(list((root / "other").glob("*.safetensors"))) > 2
    config = teacher(root, root / "other")
    assert dry_run(config, examine).problems == []
    parts, question = asked(root, config)
    expected = velocity_of(root, backbone_of(root / "model").load_transformer(root / "other"), question)
    base = velocity_of(root, backbone_of(root / "model").load_transformer(root / "model"), question)
    torch.testing.assert_close(parts.fields[1](*question), expected)
    assert (expected - base).norm() > 0.1 * base.norm()


def test_adapters_of_a_teacher_with_weights_of_its_own(places):
    root = places("sd3")
    lora = root / "two.safetensors"
    config = config_of(root, **{"sources.two": {"weights": str(root / "other"), "lora": [{"path": str(lora)}]}})
    assert dry_run(config, examine).problems == []
    parts, question = asked(root, config)
    other = backbone_of(root / "model").load_transformer(root / "other")
    expected = velocity_of(
        root, merge_into(deepcopy(other), load_lora(lora, other, pipeline_class_of(root / "model"))), question
    )
    torch.testing.assert_close(parts.fields[1](*question), expected)


def test_a_dora_and_a_lora_cut_to_a_rank_are_sources(places, tmp_path, capsys):
    """Both on the shared base: the one by the base's weights, the other by the best of its rank, with its error."""
    root, file, layer = places("sd3"), tmp_path / "dora.safetensors", "transformer_blocks.0.attn.to_k"
    transformer = backbone_of(root / "model").load_transformer(root / "model")
    weight = transformer.get_submodule(layer).weight.detach().double()
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, weight.shape[1], generator=generator), torch.randn(len(weight), 2, generator=generator)
    turned = weight + 0.1 * (up @ down).double()
    magnitude = turned.norm(dim=1, keepdim=True) * (0.5 + torch.rand(len(weight), 1, generator=generator))
    state = {f"transformer.{layer}.lora_down.weight": 0.1 * down, f"transformer.{layer}.lora_up.weight": up}
    save_file(state | {f"transformer.{layer}.dora_scale": magnitude.float()}, file)
    sources = {"sources.one.lora": [{"path": str(root / "one.safetensors"), "rank": 1}]}
    sources["sources.two.lora"] = [{"path": str(file)}]
    config = config_of(root, **sources)
    assert dry_run(config, examine).problems == []
    parts, question = asked(root, config)
    said = capsys.readouterr().out
    assert "one.safetensors: cut to rank 1, which leaves out" in said
    changed = deepcopy(transformer)
    change = turned * magnitude / turned.norm(dim=1, keepdim=True) - weight
    changed.get_submodule(layer).weight.data += change.float()
    torch.testing.assert_close(parts.fields[1](*question), velocity_of(root, changed, question), rtol=1e-4, atol=1e-4)
    whole = load_lora(root / "one.safetensors", transformer, pipeline_class_of(root / "model"))
    left, total = 0.0, 0.0
    for name, (a, b, scale) in whole.items():
        u, s, vh = torch.linalg.svd(scale * b @ a, full_matrices=False)
        transformer.get_submodule(name).weight.data += s[0] * u[:, :1] @ vh[:1]
        left, total = left + s[1:].square().sum().item(), total + s.square().sum().item()
    torch.testing.assert_close(
        parts.fields[0](*question), velocity_of(root, transformer, question), rtol=1e-4, atol=1e-4
    )
    assert f"leaves out {(left / total) ** 0.5:.1%}"[:-2] in said


@pytest.mark.parametrize("family", ["sd3", "flux", "klein", "qwen", "z"])
def test_a_file_of_diffusers_names(places, family):
    root = places(family)
    like = empty_transformer(root / "model")
    loaded = load_transformer_file(root / "other.safetensors", like, root / "model", torch.float32)
    expected = backbone_of(root / "model").load_transformer(root / "other").state_dict()
    assert not loaded.training
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    half = load_transformer_file(root / "other.safetensors", like, root / "model", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("whole", [False, True], ids=["transformer", "whole_checkpoint"])
@pytest.mark.parametrize(("family", "original"), [("sd3", as_sd3), ("klein", as_flux2), ("z", as_z_image)])
def test_a_file_of_the_original_layout(places, tmp_path, family, original, whole):
    root, file = places(family), tmp_path / "teacher.safetensors"
    tensors = original(load_file(root / "other.safetensors"))
    if whole:
        tensors = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
        tensors["first_stage_model.encoder.conv_in.weight"] = torch.zeros(2)
    save_file({key: value.clone() for key, value in tensors.items()}, file)
    config = teacher(root, file)
    assert dry_run(config, examine).problems == []
    parts, question = asked(root, config)
    expected = velocity_of(root, backbone_of(root / "model").load_transformer(root / "other"), question)
    torch.testing.assert_close(parts.fields[1](*question), expected)


def hollow(path, shapes):
    """A safetensors file of these shapes in bfloat16, with a hole for its values."""
    entries, end = {}, 0
    for key, shape in shapes.items():
        first, end = end, end + 2 * torch.Size(shape).numel()
        entries[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [first, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


def test_a_file_of_flux_in_its_original_layout_by_its_header(tmp_path):
    """The conversion is written for the released width, so a tiny one cannot stand for it."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    width, shapes = 3072, {}

    def linear(name, out, inside):
        shapes.update({f"{name}.weight": (out, inside), f"{name}.bias": (out,)})

    for name, inside in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", width, inside)
        linear(f"{name}.out_layer", width, width)
    for stream in ("img", "txt"):
        linear(f"double_blocks.0.{stream}_mod.lin", 6 * width, width)
        linear(f"double_blocks.0.{stream}_attn.qkv", 3 * width, width)
        linear(f"double_blocks.0.{stream}_attn.proj", width, width)
        linear(f"double_blocks.0.{stream}_mlp.0", 4 * width, width)
        linear(f"double_blocks.0.{stream}_mlp.2", width, 4 * width)
        shapes |= {f"double_blocks.0.{stream}_attn.norm.{k}_norm.scale": (128,) for k in ("query", "key")}
    linear("single_blocks.0.modulation.lin", 3 * width, width)
    linear("single_blocks.0.linear1", 7 * width, width)
    linear("single_blocks.0.linear2", width, 5 * width)
    shapes |= {f"single_blocks.0.norm.{k}_norm.scale": (128,) for k in ("query", "key")}
    linear("img_in", width, 64)
    linear("txt_in", width, 4096)
    linear("final_layer.linear", 64, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    check_transformer_file(hollow(tmp_path / "flux.safetensors", shapes), transformer)
    extra = shapes | {"double_blocks.1.img_attn.norm.other.scale": (128,)}
    with pytest.raises(UserError, match=r"lacks .* tensors of this FluxTransformer2DModel"):
        check_transformer_file(hollow(tmp_path / "odd.safetensors", extra), transformer)
    with pytest.raises(UserError, match="1 tensor would be left out, such as text_model"):
        check_transformer_file(hollow(tmp_path / "more.safetensors", shapes | {"text_model.x": (2,)}), transformer)


def damage(root, tmp_path, kind):
    """(weights, what the message says) of a teacher that cannot be one."""
    good, file = load_file(root / "other.safetensors"), tmp_path / "teacher.safetensors"
    first = next(iter(good))
    if kind == "gone":
        return file, "there is no file .*teacher"
    if kind == "no folder":
        return tmp_path / "nothing", "nothing"
    if kind == "pickle":
        torch.save(good, tmp_path / "teacher.ckpt")
        return tmp_path / "teacher.ckpt", "must be a safetensors file"
    if kind == "cut":
        file.write_bytes((root / "other.safetensors").read_bytes()[:-1000])
        return file, "cannot be read as safetensors"
    if kind == "lacks a key":
        save_file({key: value for key, value in good.items() if key != first}, file)
        return file, f"lacks 1 of {len(good)} tensors of this SD3Transformer2DModel, such as {first}"
    if kind == "one too many":
        save_file(good | {"more.weight": torch.zeros(2)}, file)
        return file, "1 tensor would be left out, such as more.weight"
    if kind == "another size":
        save_file(good | {first: torch.zeros(7, 3)}, file)
        return file, rf"{first} is \[7, 3\] there"
    if kind == "scaled":
        save_file(good | {"x.scale_weight": torch.ones(1)}, file)
        return file, r"is quantized \(x.scale_weight\)"
    if kind == "integers":
        save_file(good | {first: good[first].to(torch.int8)}, file)
        return file, rf"is quantized \({first}\)"
    raise ValueError(kind)


KINDS = ("gone", "no folder", "pickle", "cut", "lacks a key", "one too many", "another size", "scaled", "integers")


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_cannot_be_one_is_said_before_training(places, tmp_path, kind):
    root = places("sd3")
    weights, message = damage(root, tmp_path, kind)
    config = teacher(root, weights)
    with pytest.raises(UserError, match=rf"sources\.two\.weights: .*{message}"):
        build_model(config)
    (problem, *_) = dry_run(config, examine).problems
    with pytest.raises(UserError, match=rf"sources\.two\.weights: .*{message}"):
        raise UserError(problem)


def test_a_file_of_another_model_and_a_class_without_conversion(places, tmp_path):
    root = places("sd3")
    with pytest.raises(UserError, match=r"lacks .* of another model"):
        build_model(teacher(root, places("z") / "other.safetensors"))
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        foreign = PixArtTransformer2DModel(num_layers=1, num_attention_heads=1, cross_attention_dim=72, sample_size=8)
    with pytest.raises(UserError, match="diffusers reads no single file as a PixArtTransformer2DModel"):
        check_transformer_file(root / "other.safetensors", foreign)


def test_the_dry_run_reads_a_files_header_alone(places, monkeypatch):
    root, real = places("sd3"), tensor_files.safe_open

    def opened(path, framework):
        assert "other" not in str(path), "more than the header"
        return real(path, framework=framework)

    monkeypatch.setattr(tensor_files, "safe_open", opened)
    plan = dry_run(teacher(root, root / "other.safetensors"), examine)
    assert plan.problems == []
    assert plan.parameters["source two, beside the base"] == plan.parameters["base"]
    assert plan.memory["sources of their own weights"][0] == plan.memory["base weights"][0]
    with pytest.raises(AssertionError, match="more than the header"):
        build_model(teacher(root, root / "other.safetensors"))


# ------------------------------------------------------------------------------------------------ host memory


def hooked(network):
    return [name for name, module in network.named_modules() if hasattr(module, "_diffusers_hook")]


@pytest.mark.parametrize("family", ["sd3", "flux", "klein", "qwen", "z"])
def test_a_streamed_teacher_answers_the_same(places, family):
    root = places(family)
    number = {"embedded_guidance": 3.5} if family == "flux" else {}
    changes = {f"sources.one.{key}": value for key, value in number.items()}
    changes |= {f"student.{key}": value for key, value in number.items()}
    weights = {"sources.two": {"weights": str(root / "other"), **number}}
    parts, question = asked(root, config_of(root, **weights, **changes))
    streamed, _ = asked(root, config_of(root, **weights, **changes, **{"training.offload_sources": True}))
    expected = parts.fields[1](*question)
    for _ in range(2):  # the second forward is the first that would fetch ahead
        torch.testing.assert_close(streamed.fields[1](*question), expected, rtol=0, atol=0)


def test_the_hooks_run_for_each_block(places):
    root = places("klein")
    backbone = backbone_of(root / "model")
    network = stream_blocks(backbone.load_transformer(root / "other"), torch.device("cpu"))
    blocks = [f"transformer_blocks.{i}" for i in range(2)] + [f"single_transformer_blocks.{i}" for i in range(2)]
    assert set(hooked(network)) == {"", *blocks}
    seen = []
    for name in hooked(network):
        group = network.get_submodule(name)._diffusers_hook.hooks["group_offloading"].group
        group.onload_ = lambda name=name, real=group.onload_: (seen.append(name), real())
    _, question = asked(root)
    SharedBase(network, [], backbone.velocity).field(-1)(*question)
    assert seen == ["", *blocks]


def test_training_with_a_streamed_teacher_and_what_it_takes(places, tmp_path):
    root = places("sd3")
    changes = {"training.max_steps": 2, "training.save_every": 1}
    runs = {}
    for offload in (False, True):
        folder = str(tmp_path / f"run{offload}")
        options = {**changes, "training.output_dir": folder, "training.offload_sources": offload}
        runs[offload] = distill(teacher(root, root / "other", **options))
    name = "student/pytorch_lora_weights.safetensors"
    assert (runs[False] / name).read_bytes() == (runs[True] / name).read_bytes()
    plan = dry_run(teacher(root, root / "other", **{"training.offload_sources": True}), examine)
    network = backbone_of(root / "model").load_transformer(root / "other")
    assert plan.host["sources of their own weights"][0] == nbytes(network)
    blocks = sorted(map(nbytes, network.transformer_blocks))
    assert plan.memory["sources, streamed"][0] == nbytes(network) - sum(blocks[:-2])
    assert "sources of their own weights" not in plan.memory
    assert "sources of their own weights, in host memory" in plan.text()


def test_a_teacher_that_no_sample_asks_is_not_asked(places):
    parts, question = asked(places("sd3"))

    def refuse(*_):
        raise AssertionError("asked")

    expected = parts.fields[0](*question)
    torch.testing.assert_close(
        routed([parts.fields[0], refuse], torch.zeros(3, dtype=torch.int64), *question).target(), expected.float()
    )
    with pytest.raises(AssertionError, match="asked"):
        routed([parts.fields[0], refuse], torch.tensor([0, 1, 0]), *question)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_streamed_teacher_never_lies_on_the_device_as_a_whole():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 8, "joint_attention_dim": 256}
    network = FluxTransformer2DModel(**sizes).to(torch.bfloat16).eval().requires_grad_(False)
    inputs = {
        "hidden_states": torch.randn(1, 64, 64),
        "encoder_hidden_states": torch.randn(1, 16, 256),
        "pooled_projections": torch.randn(1, 768),
    }
    inputs = {key: value.to("cuda", torch.bfloat16) for key, value in inputs.items()}
    inputs |= {"timestep": torch.full((1,), 0.5, device="cuda")}
    inputs |= {"txt_ids": torch.zeros(16, 3, device="cuda"), "img_ids": torch.zeros(64, 3, device="cuda")}
    size = nbytes(network)
    with torch.no_grad():
        expected = deepcopy(network).cuda()(**inputs).sample.cpu()
        torch.cuda.empty_cache()
        stream_blocks(network, torch.device("cuda"))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            torch.testing.assert_close(network(**inputs).sample.cpu(), expected)
    assert torch.cuda.max_memory_allocated() - before < size / 2


# --------------------------------------------------------------------------------------------- a base of 8 bits


EIGHT = {"training.base_precision": "int8"}


def eight_bit_layers(network):
    return [name for name, module in network.named_modules() if hasattr(getattr(module, "weight", None), "qdata")]


@pytest.mark.parametrize("family", ["sd3", "klein", "z"])
def test_a_base_of_8_bits_is_near_and_small(places, family):
    pytest.importorskip("torchao")
    root = places(family)
    changes = {"sources.two": {"weights": str(root / "other")}}
    plain, question = asked(root, config_of(root, **changes))
    half, _ = asked(root, config_of(root, **changes, **{"training.precision": "bf16"}))
    parts, _ = asked(root, config_of(root, **changes, **EIGHT))
    for field, rounded, expected in zip(parts.fields, half.fields, plain.fields, strict=True):
        expected = expected(*question)
        error = (field(*question) - expected).norm()
        most = 2 if family == "z" else 1  # times what bfloat16 moves it
        assert 0 < error < most * (rounded(*question) - expected).norm()
    shared = parts.student._shared[0]
    network = shared.transformer
    quantized = eight_bit_layers(network)
    linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and ("blocks." in n or "layers." in n)]
    assert set(linear) <= set(quantized)
    outside = [name for name, _ in network.named_children() if not name.endswith(("blocks", "layers", "refiner"))]
    assert not [name for name in quantized if name.split(".")[0] in outside]
    for name in quantized:
        layer = network.get_submodule(name)
        assert layer.weight.qdata.nbytes == layer.in_features * layer.out_features
        assert layer.weight.scale.numel() == layer.out_features
    # The student begins as the base does.
    base = shared.field(-1)(*question)
    torch.testing.assert_close(parts.student(*question), base, rtol=1e-5, atol=1e-6)


def test_gradients_through_8_bits_are_those_of_the_numbers_they_stand_for(places):
    pytest.importorskip("torchao")
    root = places("sd3")
    gradients, kept = [], []
    _, question = asked(root)
    for how in ("plain", "eight", "checkpointed"):
        parts = build_model(config_of(root, **EIGHT))
        network = parts.student._shared[0].transformer
        if how == "plain":
            for name in eight_bit_layers(network):
                layer = network.get_submodule(name)
                layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
        if how == "checkpointed":
            parts.student._shared[0].enable_gradient_checkpointing()
        with torch.no_grad():
            for value in parts.student.parameters():
                value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
        held = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.setdefault(id(t), t), lambda t: t)
        with hooks:
            velocity = parts.student(*question)
        kept.append(sum(tensor.nbytes for tensor in held.values()))
        velocity.square().mean().backward()
        gradients.append({name: value.grad for name, value in parts.student.named_parameters()})
    assert any(value is not None and value.any() for value in gradients[0].values())
    for name, expected in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], expected, rtol=1e-4, atol=1e-7)
    assert kept[2] < kept[1] / 4  # no block's unpacked weights outlive its forward


def learn_and_resume(root, tmp_path, **options):
    """20 steps that bring the student nearer its sources; the last 4 of them once more, from a checkpoint."""
    options |= {"training.learning_rate": 1e-2, "training.warmup_steps": 1, "training.log_every": 1}
    options |= {"training.ema_decay": 0.5, "training.max_steps": 20, "training.save_every": 16}
    options |= {f"sources.{n}.lora": [{"path": str(root / f"{n}.safetensors"), "scale": 20}] for n in ("one", "two")}
    runs = [tmp_path / "whole", tmp_path / "again"]
    configs = [config_of(root, **options, **{"training.output_dir": str(folder)}) for folder in runs]
    distill(configs[0])
    _, gaps = measure_errors(runs[0], configs[0])
    before, after = (sum(gap[when] for gap in gaps.values()) for when in ("before", "after"))
    assert after < 0.9 * before
    (runs[1] / "checkpoints").mkdir(parents=True)
    shutil.copytree(*(run / "checkpoints" / "step-00000016" for run in runs))
    distill(configs[1])
    name = "student/pytorch_lora_weights.safetensors"
    assert (runs[1] / name).read_bytes() == (runs[0] / name).read_bytes()
    return configs[0]


def test_training_on_8_bits_learns_resumes_and_copies(places, tmp_path):
    pytest.importorskip("torchao")
    root = places("sd3")
    config = learn_and_resume(root, tmp_path, **EIGHT, **{"training.gradient_checkpointing": True})
    parts, question = asked(root, config)
    other = deepcopy(parts.student)
    assert other._shared[0] is parts.student._shared[0]
    torch.testing.assert_close(other(*question), parts.student(*question), rtol=0, atol=0)
    network = parts.student._shared[0].transformer
    assert eight_bit_layers(deepcopy(network)) == eight_bit_layers(network)


def test_a_streamed_teacher_of_8_bits(places):
    pytest.importorskip("torchao")
    root = places("klein")
    parts, question = asked(root, teacher(root, root / "other", **EIGHT))
    streamed, _ = asked(root, teacher(root, root / "other", **EIGHT, **{"training.offload_sources": True}))
    torch.testing.assert_close(streamed.fields[1](*question), parts.fields[1](*question), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["flux", "klein", "z"])
def test_the_dry_run_counts_8_bits_as_they_are_stored(places, family):
    pytest.importorskip("torchao")
    root = places(family)
    number = {"embedded_guidance": 3.5} if family == "flux" else {}
    changes = {f"{place}.{key}": v for place in ("sources.one", "sources.two", "student") for key, v in number.items()}
    changes |= {"training.precision": "bf16", "training.gradient_checkpointing": True}
    plan, plain = dry_run(config_of(root, **changes, **EIGHT), examine), dry_run(config_of(root, **changes), examine)
    assert plan.problems == []
    network = build_model(config_of(root, **changes, **EIGHT)).student._shared[0].transformer
    adapters = sum(b.nbytes for name, b in network.named_buffers() if name.endswith(("lora_a", "lora_b")))
    assert plan.memory["base weights"][0] == nbytes(network) - adapters
    assert plan.memory["sources beside the base"] == plain.memory["sources beside the base"]
    # Unpacked weights: of all blocks, or of the one that the backward is at.
    assert plan.activations[0] > plain.activations[0]
    assert plain.activations[1] < plan.activations[1] < plan.activations[0]


def test_8_bits_without_torchao(places, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    config = config_of(places("sd3"), **EIGHT)
    with pytest.raises(UserError, match=r"base_precision: int8 needs torchao.*pip install 'danceopd\[8bit\]'"):
        build_model(config)
    assert [problem for problem in dry_run(config, examine).problems if "needs torchao" in problem]


def test_adamw_of_8_bits_learns_and_resumes(places, tmp_path):
    pytest.importorskip("torchao")
    # States of 4096 numbers and more have 8 bits.
    lora = {"rank": 256, "targets": ["attn.to_q", "attn.to_k", "attn.to_v"]}
    config = learn_and_resume(places("sd3"), tmp_path, **{"training.optimizer": "adamw_8bit", "student.lora": lora})
    checkpoint, _ = load_newest(config.training.output_dir / "checkpoints")
    states = list(checkpoint.rest["engine"]["optimizer"].values())
    assert states
    assert all(s["exp_avg"].codes.dtype == s["exp_avg_sq"].codes.dtype == torch.uint8 for s in states)


# --------------------------------------------------------------------------------------- embedded guidance


def test_sources_on_one_base_are_each_asked_with_their_own_number(places):
    root = places("flux")
    numbers = {"student.embedded_guidance": 3.5, "sources.one.embedded_guidance": 1.5}
    parts, (latents, sigma, conditioning) = asked(
        root, config_of(root, **numbers, **{"sources.two.embedded_guidance": 6.0})
    )
    assert parts.fields[0].network is parts.fields[1].network
    route = torch.tensor([0, 1, 0])
    mixed = routed(parts.fields, route, latents, sigma, conditioning).target()
    together = torch.stack([parts.fields[m](latents, sigma, conditioning)[i].float() for i, m in enumerate(route)])
    torch.testing.assert_close(mixed, together, rtol=1e-4, atol=1e-5)
    backbone = backbone_of(root / "model")
    transformer, answers = backbone.load_transformer(root / "model"), {}
    for name in ("one", "two"):
        adapted = merge_into(
            deepcopy(transformer),
            load_lora(root / f"{name}.safetensors", transformer, pipeline_class_of(root / "model")),
        )
        for number in (1.5, 6.0):
            with torch.no_grad():
                answers[name, number] = backbone.velocity(adapted, latents, sigma, conditioning.prompt, guidance=number)
    for i, key in enumerate((("one", 1.5), ("two", 6.0), ("one", 1.5))):
        torch.testing.assert_close(mixed[i], answers[key][i], rtol=1e-4, atol=1e-5)
    assert (answers["one", 1.5] - answers["one", 6.0]).abs().max() > 1e-3
