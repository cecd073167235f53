"""Layouts of other tools: diffusers' own converters read them, or each name is the published network's."""

import importlib
from copy import deepcopy

import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_flux3_lora_to_diffusers,
    _convert_non_diffusers_krea2_lora_to_diffusers,
)
from original_layouts import as_flux2, as_sd3, as_z_image
from safetensors.torch import save_file
from small_loras import TINY, close, diffusers_deltas, random_lora
from torch import nn

from danceopd.models.backbones import empty_transformer, pipeline_class_of
from danceopd.models.blocks import preset_layers
from danceopd.models.lora_files import load_lora
from danceopd.models.lora_layouts import LAYOUTS, in_layout
from danceopd.models.lora_names import published_layers
from danceopd.support.errors import UserError


def changes(lora):
    return {name: scale * b @ a for name, (a, b, scale) in lora.items()}


def blocks_lora(transformer, rank=2):
    """A random LoRA of attention and feed-forwards; the first layer has another rank, one is left out."""
    first, _, *rest = preset_layers(transformer, "attention+ffn")
    return random_lora(transformer, tuple(rest), rank, 1, 0.5) | random_lora(transformer, (first,), 3, 2)


ORIGINAL = {"sd3": as_sd3, "flux2": as_flux2, "z": as_z_image}


@pytest.mark.parametrize("family", ORIGINAL)
def test_published_names_are_those_of_the_published_weights(family):
    """Every linear layer's rows lie where the file that diffusers' own converter reads has them."""
    transformer = TINY[family][1]()
    weights = transformer.state_dict()
    if family == "sd3":
        weights["pos_embed.pos_embed"] = torch.zeros(1)
    original, seen = ORIGINAL[family](weights), set()
    for name, layers in published_layers(transformer).items():
        seen |= set(layers)
        if name.startswith("guidance_in."):  # klein, whose files the converter reads, has none
            continue
        rows = torch.cat([transformer.get_submodule(layer).weight for layer in dict.fromkeys(layers)])
        if len(set(layers)) < len(layers):
            rows = torch.cat(rows.chunk(2)[::-1])
        assert original[f"{name}.weight"].equal(rows), name
    same = {name for name in weights if name in original}
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    assert all(name in seen or f"{name}.weight" in same for name in linear)


CONVERTERS = {
    "krea2": _convert_non_diffusers_krea2_lora_to_diffusers,
    "flux3": _convert_non_diffusers_flux3_lora_to_diffusers,
}


@pytest.mark.parametrize("family", CONVERTERS)
def test_published_names_are_those_that_diffusers_converter_reads(family, tmp_path):
    model = importlib.import_module(f"tiny_{family}").save_tiny(tmp_path / "model")
    for name, (layer,) in published_layers(empty_transformer(model)).items():
        made = CONVERTERS[family]({f"diffusion_model.{name}.lora_A.weight": torch.ones(1)})
        assert [*made] == [f"transformer.{layer}.lora_A.weight"]


READ = [(family, layout) for family in ("flux2", "qwen", "z") for layout in LAYOUTS] + [("flux", "comfyui")]


@pytest.mark.parametrize(("family", "layout"), READ)
def test_diffusers_reads_the_same_change(family, layout, tmp_path):
    pipeline_class, build = TINY[family]
    transformer = build()
    lora = blocks_lora(transformer)
    names = {"qwen": "qwen_image", "z": "z_image"}
    save_file(in_layout(lora, transformer, layout, names.get(family, family)), tmp_path / "lora.safetensors")
    back, expected = diffusers_deltas(transformer, tmp_path / "lora.safetensors", pipeline_class), changes(lora)
    for name, change in back.items():  # of a fused layer one of the split ones may be left out
        if name in expected:
            close(change, expected[name])
        else:
            assert not change.any()
    assert back.keys() >= expected.keys()
    own = load_lora(tmp_path, transformer, pipeline_class)
    assert own.keys() == lora.keys()
    assert all(len(own[name][0]) == len(lora[name][0]) for name in lora)


def test_diffusers_reads_kohyas_fused_layers_of_flux_at_their_real_size():
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    shapes = {
        name: transformer.get_submodule(name).weight.shape for name in preset_layers(transformer, "attention+ffn")
    }
    generator = torch.Generator().manual_seed(0)
    lora = {
        name: (torch.randn(1, width, generator=generator), torch.randn(out, 1, generator=generator), 1.0)
        for name, (out, width) in shapes.items()
    }
    tensors = in_layout(lora, transformer, "kohya", "flux")
    assert "lora_unet_single_blocks_0_linear1.lora_down.weight" in tensors
    made = _convert_kohya_flux_lora_to_diffusers(deepcopy(tensors))
    for name, (a, b, _) in lora.items():
        back_a, back_b = (made[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        rows = torch.randint(len(b), (8,), generator=generator)
        close(back_b[rows] @ back_a, b[rows] @ a)


@pytest.mark.parametrize("family", ["sd3", "longcat_image", "krea2", "qwen_image_21", "flux3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_key_is_one_of_comfyuis_key_map(family, layout, tmp_path):
    """lora_unet_ or diffusion_model. before any published name, or the prefix of diffusers' names that it maps."""
    if family not in LAYOUTS[layout]:
        pytest.skip("no such layout of this family")
    model = importlib.import_module(f"tiny_{family}").save_tiny(tmp_path / "model")
    transformer = empty_transformer(model)
    published = dict(published_layers(transformer))
    taken = {layer for layers in published.values() for layer in layers}
    whole = published | {name: (name,) for name in preset_layers(transformer, "all-linear") if name not in taken}
    lora = {}
    for name in preset_layers(transformer, "attention+ffn"):
        out, width = transformer.get_submodule(name).weight.shape
        lora[name] = torch.randn(2, width), torch.randn(out, 2), 0.5
    tensors, expected = in_layout(lora, transformer, layout, family), changes(lora)
    if LAYOUTS[layout][family][1]:
        known = {f"lora_unet_{n.replace('.', '_')}" if layout == "kohya" else f"diffusion_model.{n}": n for n in whole}
    else:
        known = {f"{LAYOUTS[layout][family][0]}.{name}": name for name in lora}
        whole = {name: (name,) for name in lora}
    up, down = ("lora_up", "lora_down") if layout == "kohya" else ("lora_B", "lora_A")
    stems = {key.removesuffix(f".{down}.weight") for key in tensors if key.endswith(f".{down}.weight")}
    written = set()
    for stem in stems:
        layers = whole[known[stem]]
        change = tensors[f"{stem}.{up}.weight"] @ tensors[f"{stem}.{down}.weight"]
        close(change, torch.cat([expected[layer] for layer in layers]))
        if layout == "kohya":
            assert tensors[f"{stem}.alpha"] == len(tensors[f"{stem}.{down}.weight"])
        written |= {*layers}
    assert written == lora.keys()
    save_file(tensors, tmp_path / "lora.safetensors")
    assert load_lora(tmp_path / "lora.safetensors", transformer, pipeline_class_of(model)).keys() == lora.keys()


def test_a_layer_without_a_name_in_the_layout_is_an_error():
    transformer = TINY["flux"][1]()
    lora = random_lora(transformer, ("time_text_embed.timestep_embedder.linear_1",), 2, 0)
    in_layout(lora, transformer, "kohya", "flux")
    with pytest.raises(UserError, match="no tool is known that reads the kohya layout of dreamlite; use --layout"):
        in_layout(lora, transformer, "kohya", "dreamlite")
    with pytest.raises(UserError, match=r"a\.b has no name in the published flux"):
        in_layout({"a.b": (torch.ones(1, 1), torch.ones(1, 1), 1.0)}, transformer, "kohya", "flux")
