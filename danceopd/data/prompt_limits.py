"""Finds prompts that a model's tokenizers do not take as written: cut at a limit, or holding special tokens."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from danceopd.models import loading
from danceopd.models.backbones import qwen_image, sd3, z_image

SHORTEST = 3  # characters of a special token that is looked for: one tokenizer pads with "!"

NAMED = 3  # rows that a line about prompts names


@dataclass(frozen=True)
class Reader:
    """One tokenizer of a model.

    Attributes:
        name: The folder that it lies in.
        limit: Tokens that its encoder takes; None where it cuts nothing.
        lengths: Counts the tokens of prompts, with all that the pipeline puts around them.
        special: The texts that it reads as one token each.
    """

    name: str
    limit: int | None
    lengths: Callable[[list[str]], list[int]]
    special: tuple[str, ...]


def readers_of(backbone: ModuleType, model: Path, length: int) -> list[Reader]:
    """Loads the tokenizers of a model, as its family's text_encoder uses them at a max_sequence_length; none for a
    family that is not known."""
    own = {"sd3": _sd3, "flux": _flux, "flux2": _flux2, "qwen_image": _qwen_image, "z_image": _z_image}
    read = own.get(backbone.__name__.rpartition(".")[2])
    return read(model, length) if read else []


def look_at_prompts(
    backbone: ModuleType, model: Path, prompts: list[str], max_sequence_length: int
) -> tuple[dict[str, dict], dict[str, int]]:
    """Finds what the tokenizers of a model change.

    Args:
        backbone: The model's family.
        model: Its pipeline's folder.
        prompts: Each once.
        max_sequence_length: As for the family's text_encoder.

    Returns:
        {prompt: {"cut": names of the tokenizers that it is longer than, "special": special tokens in it}} of the
        prompts that have any, and the limit of each tokenizer.
    """
    found: dict[str, dict] = {}
    readers = readers_of(backbone, model, max_sequence_length)
    for reader in readers:
        if reader.limit is not None:
            for prompt, length in zip(prompts, reader.lengths(prompts), strict=True):
                if length > reader.limit:
                    found.setdefault(prompt, {}).setdefault("cut", []).append(reader.name)
        tokens = [token for token in reader.special if len(token) >= SHORTEST]
        pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
        for prompt in prompts:
            if held := pattern.findall(prompt):
                own = found.setdefault(prompt, {}).setdefault("special", [])
                own += [token for token in dict.fromkeys(held) if token not in own]
    return found, {reader.name: reader.limit for reader in readers if reader.limit is not None}


def prompt_notes(rows: list[dict], limits: dict[str, int]) -> list[str]:
    """Says of prepared rows what look_at_prompts found, a line for each tokenizer and one for special tokens."""
    lines = []
    for name, limit in limits.items():
        if cut := [str(row["id"]) for row in rows if name in row.get("cut", ())]:
            lines.append(
                f"{len(cut)} of {len(rows)} prompts are longer than the {limit} tokens of {name} and are cut there: "
                f"{_some(cut)}"
            )
    if special := [str(row["id"]) for row in rows if row.get("special")]:
        tokens = dict.fromkeys(token for row in rows for token in row.get("special", ()))
        lines.append(
            f"{len(special)} of {len(rows)} prompts hold special tokens, read as such and not as text "
            f"({_some(list(tokens))}): {_some(special)}"
        )
    return lines


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _reader(name: str, tokenizer, limit: int | None, around: Callable[[str], str] = str, drop: int = 0) -> Reader:
    """Makes a Reader; around: puts a prompt into its template, of which `drop` tokens are taken off again."""

    def lengths(prompts: list[str]) -> list[int]:
        counted = []
        for start in range(0, len(prompts), 1000):
            texts = [around(prompt) for prompt in prompts[start : start + 1000]]
            counted += [len(ids) - drop for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        return counted

    return Reader(name, limit, lengths, _special(tokenizer))


def _special(tokenizer) -> tuple[str, ...]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _sd3(model: Path, length: int) -> list[Reader]:
    from transformers import CLIPTokenizer, T5TokenizerFast

    first, second = (loading.load_tokenizer(CLIPTokenizer, model / f"tokenizer{end}") for end in ("", "_2"))
    readers = [_reader(n, t, first.model_max_length) for n, t in (("tokenizer", first), ("tokenizer_2", second))]
    if sd3._has_t5(model):
        t5 = loading.load_tokenizer(T5TokenizerFast, model / "tokenizer_3")
        readers.append(_reader("tokenizer_3", t5, length))
    return readers


def _flux(model: Path, length: int) -> list[Reader]:
    from transformers import CLIPTokenizer, T5TokenizerFast

    clip = loading.load_tokenizer(CLIPTokenizer, model / "tokenizer")
    t5 = loading.load_tokenizer(T5TokenizerFast, model / "tokenizer_2")
    return [_reader("tokenizer", clip, clip.model_max_length), _reader("tokenizer_2", t5, length)]


def _flux2(model: Path, length: int) -> list[Reader]:
    from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input
    from transformers import AutoProcessor, Qwen2TokenizerFast

    if loading.class_name_of(model) != "Flux2Pipeline":
        return [_chat(loading.load(Qwen2TokenizerFast, model / "tokenizer"), length, enable_thinking=False)]
    processor = loading.load(AutoProcessor, model / "tokenizer")

    def lengths(prompts: list[str]) -> list[int]:
        messages = format_input(prompts=list(prompts), system_message=SYSTEM_MESSAGE)
        told = processor.apply_chat_template(messages, add_generation_prompt=False, tokenize=True, return_dict=True)
        return [len(ids) for ids in told["input_ids"]]

    return [Reader("tokenizer", length, lengths, _special(getattr(processor, "tokenizer", processor)))]


def _chat(tokenizer, length: int, **options) -> Reader:
    def around(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    return _reader("tokenizer", tokenizer, length, around)


def _qwen_image(model: Path, length: int) -> list[Reader]:
    import diffusers
    from transformers import Qwen2Tokenizer

    tokenizer = loading.load_tokenizer(Qwen2Tokenizer, model / "tokenizer")
    if "edit" in qwen_image.tasks(model):  # the editing pipeline does not cut
        return [_reader("tokenizer", tokenizer, None)]
    parts = dict.fromkeys(("scheduler", "vae", "transformer", "text_encoder"))
    pipeline = diffusers.QwenImagePipeline(tokenizer=tokenizer, **parts)
    template, drop = pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx
    return [_reader("tokenizer", tokenizer, length, template.format, drop)]


def _z_image(model: Path, length: int) -> list[Reader]:
    from transformers import AutoTokenizer

    tokenizer = loading.load(AutoTokenizer, model / "tokenizer")
    if "edit" not in z_image.tasks(model):
        return [_chat(tokenizer, length, enable_thinking=True)]
    # The longest of the parts that pictures cut a prompt into has the prompt itself.
    around = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>".format
    return [_reader("tokenizer", tokenizer, length, around)]
