"""Writes a run's student for others: an adapter for diffusers, ComfyUI or kohya's tools, or a whole transformer."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import yaml
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from danceopd.config.expressions import parts
from danceopd.config.reading import read_run_config
from danceopd.config.sections import Config
from danceopd.data.prepared import PreparedData
from danceopd.models.backbones import backbone_of, empty_transformer, pipeline_class_of
from danceopd.models.blocks import block_layers
from danceopd.models.loading import class_name_of, hub_id, transformer_folder
from danceopd.models.lora_algebra import Lora
from danceopd.models.lora_files import FILES, load_lora, loads_loras, save_lora
from danceopd.models.lora_layouts import in_layout, save_peft
from danceopd.models.saving import save_pretrained
from danceopd.models.weights import Weights, check_fits, of_folder, plus
from danceopd.report.tables import format_markdown
from danceopd.support.errors import UserError
from danceopd.support.files import new_folder
from danceopd.support.run_log import read_log
from danceopd.support.texts import many, parse_object
from danceopd.tools.provenance import base_name, provenance

LAST = 5  # records of the training curve in a model card

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# What a user calls the dtype of what is written. fp8: e4m3 for the linear weights of a merged transformer's blocks, as
# they are and without scales, beside bf16.
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def export(
    run: Path,
    output: Path,
    merge: bool = False,
    layout: str = "diffusers",
    dtype: str | None = None,
    triggers: Sequence[str] = (),
) -> Path:
    """Writes the student of a run into a new folder, with a model card.

    An adapter is written as the pipeline's load_lora_weights takes it, or in another tool's layout, or with `merge` the
    transformer with it as from_pretrained takes it; of a run that trained all weights always the transformer. The
    file's metadata has the base, trigger words and the sources' hashes.

    Args:
        run: The run's folder.
        output: The new folder.
        merge: Whether the adapter is merged into its transformer.
        layout: "diffusers", "peft", "comfyui" or "kohya".
        dtype: One of STORAGE; what the student was trained in, or the base's files are stored in, if not given.
        triggers: Words for metadata and card; those that the sources' own files name if not given.

    Returns:
        The folder.

    Raises:
        UserError: The run has no student, its base is no longer there, the family lacks the layout, or the output is
            there.
    """
    config = _config_of(run)
    backbone = backbone_of(config.model)
    facts = provenance(config, triggers)
    if not config.student.lora:
        return _export_full(run, output, config, layout, dtype, facts)
    if merge and layout != "diffusers":
        raise UserError("a merged transformer is written as diffusers does; leave out --layout, or --merge")
    if dtype == "fp8" and not merge:
        raise UserError("an adapter is stored in fp32, bf16 or fp16; fp8 is for --merge")
    pipeline_class, empty = pipeline_class_of(config.model), empty_transformer(config.model)
    lora = load_lora(run / "student", empty, pipeline_class)
    card = model_card(run, config, merge, layout, type(empty).__name__, facts)
    with new_folder(output) as folder:
        if merge:
            base = transformer_folder(config.model)
            _write_merged(empty, plus(of_folder(base), lora), folder, dtype, stored_dtype(base), facts)
        else:
            if dtype:
                lora = {
                    name: (a.to(STORAGE[dtype]), (b * s).to(STORAGE[dtype]), 1.0) for name, (a, b, s) in lora.items()
                }
            family = backbone.__name__.rpartition(".")[2]
            write_adapter(lora, folder, layout, family, empty, pipeline_class, facts)
        card.save(folder / "README.md")
    return output


def _export_full(
    run: Path, output: Path, config: Config, layout: str, dtype: str | None, facts: dict[str, str]
) -> Path:
    if layout != "diffusers":
        raise UserError(f"{run} trained all weights; {layout} is a layout of adapters: leave out --layout")
    empty, stored = empty_transformer(run / "student"), stored_dtype(transformer_folder(config.model))
    weights = of_folder(run / "student")
    check_fits(weights, empty, run / "student")
    card = model_card(run, config, True, layout, type(empty).__name__, facts)
    with new_folder(output) as folder:
        _write_merged(empty, weights, folder, dtype, stored, facts)
        card.save(folder / "README.md")
    return output


def _write_merged(
    empty: nn.Module, weights: Weights, folder: Path, dtype: str | None, stored: torch.dtype, facts: dict[str, str]
) -> None:
    """Writes a whole transformer, the linear weights of its blocks in FP8 where that is asked for."""
    narrow = {f"{name}.weight" for name, _, _ in block_layers(empty)} if dtype == "fp8" else set()
    save_pretrained(empty, weights, folder, STORAGE[dtype] if dtype else stored, narrow, facts)


def _config_of(run: Path) -> Config:
    """Returns the configuration of a run that has something to export."""
    config = read_run_config(run)
    if not config.model:
        raise UserError(f"{run} trained the embedded network; {run / 'student.safetensors'} is all of it")
    file = FILES[1] if config.student.lora else SAFE_WEIGHTS_INDEX_NAME
    if not (run / "student" / file).is_file():
        raise UserError(f"{run} holds no student/{file} yet; train first: danceopd train --config ...")
    return config


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns what most weights of a transformer's folder are stored in; a UserError where none is a float's file."""
    sizes: Counter = Counter()
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(key)
                    sizes[tensor.get_dtype()] += torch.Size(tensor.get_shape()).numel()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read as safetensors, copy it again: {error}") from error
    name = max(sizes, key=sizes.get, default="nothing")
    if name not in DTYPES:
        raise UserError(f"{folder} holds {name}, and not {', '.join(DTYPES)} safetensors; give an unquantized model")
    return DTYPES[name]


def write_adapter(
    lora: Lora, folder: Path, layout: str, family: str, empty: nn.Module, pipeline_class: type, facts: dict[str, str]
) -> None:
    """Writes an adapter and reads it back: it must be the same.

    Args:
        lora: The adapter.
        folder: Where to.
        layout, family: The layout, and the model family's module.
        empty: The transformer without values.
        pipeline_class: Diffusers' class of the pipeline.
        facts: The file's metadata.

    Raises:
        UserError: What is read back is another adapter.
    """
    if layout == "peft":
        file = save_peft(lora, folder, facts.get("base_model"), facts)
    elif layout == "diffusers":
        file = save_lora(lora, folder, pipeline_class, facts)
    else:
        file = folder / FILES[1]
        save_file(in_layout(lora, empty, layout, family), file, {"format": "pt", **facts})
    refused = f"this adapter cannot be read back from the {layout} layout; use --layout diffusers"
    try:
        back = load_lora(file, empty, pipeline_class)
    except UserError as error:
        raise UserError(f"{refused}: {error}") from None
    changed = [name for name, factors in lora.items() if name in back and not _alike(factors, back[name])]
    changed += [name for name, (a, b, _) in lora.items() if name not in back and a.any() and b.any()]
    if changed or back.keys() - lora.keys():
        raise UserError(f"{refused}: {', '.join(changed[:3]) or 'other layers'} would change")


def _alike(one: tuple, other: tuple) -> bool:
    """Returns whether two pairs of factors are the same but for parts of the rank that change nothing."""
    (a, b), (c, d) = (_used(*factors) for factors in (one, other))
    return a.equal(c) and b.equal(d)


def _used(a: torch.Tensor, b: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    b = b.float() * scale
    return a.float()[b.any(0)], b[:, b.any(0)]


def model_card(
    run: Path, config: Config, merge: bool, layout: str, transformer_class: str, facts: dict[str, str]
) -> ModelCard:
    """Writes what the student is, how to load it, what it was trained on and with, the end of its curve, its scores."""
    base, name = hub_id(config.model), class_name_of(config.model)
    edits = any(capability.task == "edit" for capability in config.capabilities.values())
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if merge else "adapter",
        library_name="diffusers",
        pipeline_tag="image-to-image" if edits else "text-to-image",
        tags=["danceopd", "distillation", *([] if merge else ["lora"])],
    )
    kind = "transformer" if merge else "LoRA"
    shown = base_name(config.model)
    parts = [
        f"# {shown}: {_title(config)}",
        f"A {kind} of `{shown}`, distilled from {many(len(config.sources), 'source')} on the student's own "
        f"trajectories (method `{config.method}`, [arXiv 2606.27377](https://arxiv.org/abs/2606.27377)).",
        "## Use",
        _usage(shown, name, transformer_class, merge, layout),
        *([f"Words that call it in a prompt: {words}."] if (words := facts.get("trigger_words")) else []),
        "## Data",
        _data_table(config),
        "## Training",
        _curve(run, config),
    ]
    if scores := _scores(run):
        parts += ["## Scores", scores]
    settings = yaml.safe_dump(_without_places(config.to_dict()), sort_keys=False, allow_unicode=True)
    parts += ["## Configuration", f"```yaml\n{settings}```"]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _title(config: Config) -> str:
    """Names what the student was taught, without what the base alone answers and what names two capabilities."""
    names = list(config.capabilities)
    found = [
        name
        for name, capability in config.capabilities.items()
        if not (_is_base(config, capability.source) or (" + " in name and set(name.split(" + ")) <= set(names)))
    ]
    return " + ".join(found or names)


def _is_base(config: Config, name: str) -> bool:
    """Tells whether a source is the base, or made of nothing else."""
    of = [part for _, part in parts(config, name)]
    source = config.sources[name]
    return all(_is_base(config, part) for part in of) if of else source.weights == "base" and not source.lora


def _usage(base: str, name: str, transformer_class: str, merge: bool, layout: str) -> str:
    if layout in ("kohya", "comfyui"):
        whose = {"kohya": "kohya's names: for ComfyUI, and the trainers", "comfyui": "names for ComfyUI, and the tools"}
        return f"`{FILES[1]}` has {whose[layout]} that read them."
    classes = f"{name}, {transformer_class}" if merge else name
    load = 'pipeline.load_lora_weights("THIS_FOLDER")'
    if layout == "peft":
        load = 'pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, "THIS_FOLDER")'
    elif not loads_loras(getattr(diffusers, name)):
        load = f'pipeline.transformer.load_lora_adapter("THIS_FOLDER", weight_name="{FILES[1]}")'
    if not merge and not hasattr(getattr(diffusers, transformer_class), "load_lora_adapter"):
        return "diffusers gives this transformer no adapters: write it merged, by `danceopd export --merge`."
    lines = [
        "import torch",
        f"from diffusers import {classes}",
        *(["from peft import PeftModel"] * (layout == "peft")),
        "",
    ]
    if merge:
        lines += [
            f'transformer = {transformer_class}.from_pretrained("THIS_FOLDER", torch_dtype=torch.bfloat16)',
            f'pipeline = {name}.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.bfloat16)',
        ]
    else:
        lines += [
            f'pipeline = {name}.from_pretrained("{base}", torch_dtype=torch.bfloat16)',
            load,
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _data_table(config: Config) -> str:
    """Returns one line a capability: how many rows it has, and who supervises them."""
    lines = [["capability", "task", "rows", "source", "guidance", "weight"], ["---"] * 6]
    for name, capability in config.capabilities.items():
        try:
            rows = str(len(PreparedData(capability.data.prepared, capability.capability or name)))
        except UserError:  # moved or deleted since the training
            rows = "?"
        source = config.sources[capability.source]
        of = [_without_places(str(lora.path)) for lora in source.lora] or [_without_places(source.weights or "base")]
        guidance = f"{source.guidance_scale:g}"
        if kind := source.operator():
            of, guidance = [f"{kind} of {', '.join(part for _, part in parts(config, capability.source))}"], "in it"
        lines.append([name, capability.task, rows, " + ".join(of), guidance, f"{capability.weight:g}"])
    return _table(lines)


def _curve(run: Path, config: Config) -> str:
    """Returns the last losses that were logged, of all samples and by capability."""
    records = read_log(run / "log.jsonl").training[-LAST:]
    if not records:
        return "No losses were logged."
    names = list(config.capabilities)
    lines = [["step", "loss", *names], ["---:"] * (2 + len(names))]
    for record in records:
        each = [record.get("loss_by_capability", {}).get(name) for name in names]
        lines.append([str(record["step"]), *("–" if x is None else f"{x:.4g}" for x in (record["loss"], *each))])
    evaluations = records[-1].get("network_evaluations")
    spent = f" and {evaluations:,} network evaluations" if evaluations else ""
    steps, samples = many(records[-1]["step"], "step"), many(config.training.batch_size, "sample")
    return f"{steps} of {samples}{spent}.\n\n{_table(lines)}"


def _scores(run: Path) -> str | None:
    path = run / "results.json"
    if not path.is_file():
        return None
    try:
        return format_markdown(parse_object(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); write it again by danceopd report, or remove it") from None


def _table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _without_places(value):
    """Cuts paths in a configuration's values to their last names: a card tells nothing of whose disk it was."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and os.sep in value:
        path = Path(value)
        return path.parent.name if path.name in FILES else path.name
    return value
