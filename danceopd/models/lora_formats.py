"""Recognises what a LoRA file holds beside plain factors, and whose layers it names."""

import difflib
import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

CHANGE = re.compile(
    r"(.+?)\.(lokr_w1|lokr_w1_a|lokr_w1_b|lokr_w2|lokr_w2_a|lokr_w2_b|hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b|diff)"
    r"(?:\.default)?(?:\.weight)?"
)

# What trainers and wrappers put in front of layers' names, also several times.
PREFIXES = ("base_model.model.", "base_model.", "transformer.", "diffusion_model.", "model.", "module.", "_orig_mod.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_", "lycoris_")  # of names with _ for every dot

MERGED = "merge it into its base with the tool that trained it, and give that transformer as the source's weights"

# What is no sum of factors or needs what the file does not hold; by an end of its keys.
REFUSED = {
    "a DoRA, whose change depends on the base's own weights": r"dora_scale|lora_magnitude_vector|magnitude",
    "an OFT or BOFT, which rotates the base's weights": r"oft_blocks|oft_diag|oft_[rRs]|boft_[rRs]",
    "an IA3, which scales the base's outputs": r"ia3_l|on_input",
    "a GLoRA, which multiplies the base's weights": r"[ab][12]",
    "a VeRA, whose shared factors are not in the file": r"vera_lambda_[bd]",
    "a LoRA of convolutions in Tucker's form": r"lok?r_t2|hada_t[12]|lora_mid",
}

# {what it changes: (transformers that it is right for, how its keys look)}
FAMILIES = {
    "a UNet, as Stable Diffusion 1, 2 and XL have one": ((), r"(down|up|input|output)_blocks|mid(dle)?_block"),
    "Wan's transformer": ((), r"(^|[._])blocks[._]\d+[._](self|cross)_attn"),
    "FLUX's transformer": (("Flux",), r"(double|single)_blocks|single_transformer_blocks"),
    "Stable Diffusion 3's transformer": (("SD3",), r"joint_blocks"),
    "Qwen-Image's transformer": (("QwenImage",), r"transformer_blocks[._]\d+[._](img|txt)_m(lp|od)"),
    "Z-Image's or Lumina's transformer": (("ZImage",), r"(noise|context)_refiner|(^|[._])layers[._]\d+[._]attention"),
}


def refused(keys: Iterable[str]) -> tuple[str, list[str]] | None:
    """Finds a format among a file's keys that no sum of factors can stand for.

    Returns:
        What it is and what to do, and its keys; None for a file without one.
    """
    keys = list(keys)
    for what, ends in REFUSED.items():
        found = [key for key in keys if re.fullmatch(rf".+\.(?:{ends})(?:\.default)?(?:\.weight)?", key)]
        if found:
            return f"is {what}; {MERGED}", found
    return None


def kind_of(keys: Iterable[str]) -> str:
    """Names the format of a file's weight changes: LoRA, LoKr, LoHa, full weights, or several of them."""
    names = {"lokr": "LoKr", "hada": "LoHa", "diff": "full weights"}
    found = {names[match[2][:4]] if (match := CHANGE.fullmatch(key)) else "LoRA" for key in keys if ".alpha" not in key}
    return " and ".join(sorted(found))


def as_factors(raw: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turns the weight changes of LoKr, LoHa and full weights into pairs of factors whose product is the same.

    LoKr's W1 (x) W2 is the product of the factors' Kronecker products, LoHa's (B1 A1) * (B2 A2) that of their
    row-wise ones, so that ranks multiply (arXiv 2108.06098, 2309.14859); a full change has a unit matrix for its other
    factor. As in LyCORIS, alpha / rank multiplies what has a rank.

    Args:
        raw: Tensors by key, on any device.

    Returns:
        All tensors by key, without those formats' keys and their alphas.

    Raises:
        ValueError: A part is missing, or no matrix.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    rest = {}
    for key, value in raw.items():
        if match := CHANGE.fullmatch(key):
            parts.setdefault(match[1], {})[match[2]] = value
        else:
            rest[key] = value
    for name, part in parts.items():
        odd = next((key for key, value in part.items() if value.dim() != 2), None)
        if odd:
            raise ValueError(f"{name}.{odd} has {part[odd].dim()} axes and changes no linear layer; train it without")
        if "diff" in part:
            b, a, rank = *full(part["diff"]), None
        elif "hada_w1_a" in part:
            b, a, rank = _loha(name, part)
        else:
            b, a, rank = _lokr(name, part)
        alpha = rest.pop(f"{name}.alpha", None)
        if alpha is not None and alpha.numel() != 1:
            raise ValueError(f"{name}.alpha is no number")
        scale = 1.0 if alpha is None or rank is None else alpha.item() / rank
        names = [f"{name}.lora_{side}.weight" for side in "AB"]
        if not rest.keys().isdisjoint([*names, f"{name}.lora_down.weight"]):
            raise ValueError(f"{name} has a LoRA and another change beside it; merge them into one")
        rest |= zip(names, (a * scale, b), strict=True)
    return rest


def full(change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (B, A) of a full weight change [out, in]: itself and a unit matrix."""
    out, width = change.shape
    unit = torch.eye(min(out, width), dtype=change.dtype, device=change.device)
    return (change, unit) if width <= out else (unit, change)


def _lokr(name: str, part: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    (b1, a1), first = _matrix(name, part, "lokr_w1")
    (b2, a2), second = _matrix(name, part, "lokr_w2")
    return torch.kron(b1, b2), torch.kron(a1, a2), second or first


def _loha(name: str, part: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    (b1, a1), rank = _matrix(name, part, "hada_w1")
    (b2, a2), _ = _matrix(name, part, "hada_w2")
    if len(b1) != len(b2) or a1.shape[1] != a2.shape[1]:
        raise ValueError(f"{name}: its two products are of different shapes")
    if len(a1) * len(a2) >= min(len(b1), a1.shape[1]):
        return *full((b1 @ a1) * (b2 @ a2)), rank
    return (b1[:, :, None] * b2[:, None]).flatten(1), (a1[:, None] * a2[None]).flatten(0, 1), rank


def _matrix(name: str, part: Mapping[str, torch.Tensor], key: str):
    """Returns ((B, A), rank) of a matrix that is stored whole, without a rank, or as two factors."""
    if key in part:
        return full(part[key]), None
    try:
        b, a = part[f"{key}_a"], part[f"{key}_b"]
    except KeyError as error:
        raise ValueError(f"{name} has no {error.args[0]}; the file is incomplete") from None
    if b.shape[1] != len(a):
        raise ValueError(f"{name}.{key}_a and {key}_b do not fit each other")
    return (b, a), len(a)


def known_layers(transformer: nn.Module) -> dict[str, tuple[str, ...]]:
    """Lists the names that files have for a transformer's linear layers.

    Returns:
        {name: layers}: the layers' own names, and of attention also the names of the layer that the original network
        has in place of several or of one; and each name once more with _ for every dot.
    """
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    found = {name: (name,) for name in linear}

    def also(name: str, *layers: str) -> None:
        if linear.issuperset(layers):
            found.setdefault(name, layers)

    for parent in sorted({name.rpartition(".")[0] for name in linear if name.endswith((".to_q", ".add_q_proj"))}):
        own, added = [f"{parent}.to_{x}" for x in "qkv"], [f"{parent}.add_{x}_proj" for x in "qkv"]
        for fused in ("qkv", "to_qkv"):
            also(f"{parent}.{fused}", *own)
        for fused in ("add_qkv_proj", "to_added_qkv"):
            also(f"{parent}.{fused}", *added)
        for x, layer in zip("qkv", own, strict=True):
            also(f"{parent}.to.{x}", layer)
        for name in ("out", "to_out"):
            also(f"{parent}.{name}", f"{parent}.to_out.0")
    if type(transformer).__name__.startswith("SD3"):
        _add_sd3(also, len(transformer.transformer_blocks))
    if type(transformer).__name__.startswith("ZImage"):
        for name, layer in {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
        }.items():
            also(name, layer)
    return {name.replace(".", "_"): layers for name, layers in found.items()} | found


def _add_sd3(also, blocks: int) -> None:
    """Adds the names of Stability's own SD3. Its last norms, whose halves diffusers swaps, are not among them."""
    for i in range(blocks):
        old, new = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        for attention in ("attn", "attn2"):
            also(f"{old}.x_block.{attention}.qkv", *(f"{new}.{attention}.to_{x}" for x in "qkv"))
            also(f"{old}.x_block.{attention}.proj", f"{new}.{attention}.to_out.0")
        also(f"{old}.context_block.attn.qkv", *(f"{new}.attn.add_{x}_proj" for x in "qkv"))
        also(f"{old}.context_block.attn.proj", f"{new}.attn.to_add_out")
        for part, feed in (("x_block", "ff"), ("context_block", "ff_context")):
            also(f"{old}.{part}.mlp.fc1", f"{new}.{feed}.net.0.proj")
            also(f"{old}.{part}.mlp.fc2", f"{new}.{feed}.net.2")
        also(f"{old}.x_block.adaLN_modulation.1", f"{new}.norm1.linear")
        if i + 1 < blocks:
            also(f"{old}.context_block.adaLN_modulation.1", f"{new}.norm1_context.linear")
    for old, new in {"t_embedder": "timestep_embedder", "y_embedder": "text_embedder"}.items():
        for i, name in ((0, "linear_1"), (2, "linear_2")):
            also(f"{old}.mlp.{i}", f"time_text_embed.{new}.{name}")
    also("final_layer.linear", "proj_out")


def layers_of(name: str, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Returns the layers that a file's name stands for, with any of the prefixes, however often; None for none."""
    prefixes = FLAT_PREFIXES if "." not in name else PREFIXES
    while name not in known:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return known[name]


def whose(keys: Iterable[str], transformer: nn.Module) -> str | None:
    """Says what network keys that a transformer does not have are of, where their names show it."""
    keys, own = list(keys), type(transformer).__name__
    for what, (classes, pattern) in FAMILIES.items():
        found = sum(bool(re.search(pattern, key)) for key in keys)
        if 2 * found > len(keys) and not own.startswith(classes or ("no",)):
            return f"its keys are those of {what}"
    return None


def nearest(name: str, known: Mapping[str, tuple[str, ...]]) -> str | None:
    """Says what is near a layer's name that is not known: the same behind another prefix, or one spelled alike."""
    for at in (match.end() for match in re.finditer(r"\.", name)):
        if name[at:] in known:
            return f"the prefix {name[:at]!r} is none that is known; without it {name[at:]} is a layer there"
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"the nearest layers to {name} are {', '.join(near)}" if near else None
