"""Recognises what a LoRA file holds beside plain factors."""

import re
from collections.abc import Iterable, Mapping

import torch

CHANGE = re.compile(
    r"(.+?)\.(lokr_w1|lokr_w1_a|lokr_w1_b|lokr_w2|lokr_w2_a|lokr_w2_b|hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b|diff)"
    r"(?:\.default)?(?:\.weight)?"
)

MAGNITUDE = re.compile(r"(.+?)\.(?:dora_scale|lora_magnitude_vector|magnitude)(?:\.default)?(?:\.weight)?")

MERGED = (
    "merge it into its base with the tool that trained it (LyCORIS: tools/merge.py, PEFT: merge_and_unload), and give "
    "that transformer as the source's weights"
)
CONVERTED = f"make it a LoRA by peft.save_as_lora, or {MERGED}"

# What is no change of weights that the file and its base give; by an end of its keys.
REFUSED = {
    f"an OFT or BOFT, which rotates the base's weights; {CONVERTED}": r"oft_blocks|oft_diag|oft_[rRs]|boft_[rRs]",
    f"an IA3, which scales the base's outputs; {MERGED}": r"ia3_l|on_input",
    f"a GLoRA, which multiplies the base's weights; {CONVERTED}": r"[ab][12]|glora_[A-E]",
    f"a VeRA, whose shared factors are not in the file; {CONVERTED}": r"vera_lambda_[bd]",
    f"a VB-LoRA, whose vectors lie in a shared bank; {CONVERTED}": r"vblora_logits_[AB]|vblora_vector_bank",
    f"a LoRA of convolutions in Tucker's form; {MERGED}": r"lok?r_t2|hada_t[12]|lora_mid",
    f"a DoRA of LyCORIS that is decomposed in the change itself; {MERGED}": r"wd_for_diff",
    "a LoRA of a quantized base for nunchaku; take the file that it was converted from": r"proj_(down|up)|smooth_orig",
    "a textual inversion and no change of weights; leave it out, prompts are encoded without it": r"emb_params"
    r"|bundle_emb\..+",
}


def refused(keys: Iterable[str]) -> tuple[str, list[str]] | None:
    """Finds a format among a file's keys that is no change of the base's linear layers.

    Returns:
        What it is and what to do, and its keys; None for a file without one.
    """
    keys = list(keys)
    for what, ends in REFUSED.items():
        found = [key for key in keys if re.fullmatch(rf"(?:.+\.)?(?:{ends})(?:\.default)?(?:\.weight)?", key)]
        if found:
            return f"is {what}", found
    return None


def without_magnitudes(raw: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Takes DoRA's magnitudes (PEFT's lora_magnitude_vector, LyCORIS's dora_scale) out of a file's tensors.

    Returns:
        The other tensors by key, and the magnitudes by what stands before their key's end.
    """
    magnitudes = {match[1]: value for key, value in raw.items() if (match := MAGNITUDE.fullmatch(key))}
    return {key: value for key, value in raw.items() if not MAGNITUDE.fullmatch(key)}, magnitudes


def decomposed(weight: torch.Tensor, change: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Returns what a DoRA adds to a weight W: m (W + D) / |W + D| - W (arXiv 2402.09353), as PEFT and LyCORIS do.

    Args:
        weight: W [out, in] of the base, in float32.
        change: D [out, in], what the factors alone would add.
        magnitude: m, [out] or [out, 1] for norms of rows, [1, in] for norms of columns.

    Returns:
        [out, in].

    Raises:
        ValueError: The magnitude is of another shape.
    """
    rows = magnitude.shape in ((len(weight),), (len(weight), 1))
    if not rows and magnitude.shape != (1, weight.shape[1]):
        raise ValueError(f"its magnitude is {list(magnitude.shape)}, for weights of {list(weight.shape)}")
    turned = weight + change
    norm = turned.norm(dim=1 if rows else 0, keepdim=True)
    return turned * (magnitude.reshape(norm.shape) / norm.clamp(min=torch.finfo(norm.dtype).tiny)) - weight


def kind_of(keys: Iterable[str]) -> str:
    """Names the format of a file's weight changes: LoRA, DoRA, LoKr, LoHa, full weights, or several of them."""
    names = {"lokr": "LoKr", "hada": "LoHa", "diff": "full weights"}
    keys = [key for key in keys if ".alpha" not in key]
    factors = [key for key in keys if not MAGNITUDE.fullmatch(key)]
    found = {names[match[2][:4]] if (match := CHANGE.fullmatch(key)) else "LoRA" for key in factors}
    return " and ".join(sorted(found)) + (" of DoRA's kind" if len(factors) < len(keys) else "")


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
            raise ValueError(
                f"{name}.{odd} has {part[odd].dim()} axes and changes no linear layer; train it without, or {MERGED}"
            )
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
