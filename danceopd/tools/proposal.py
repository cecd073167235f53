"""Proposes a run for LoRAs of one model: a commented configuration, rows of prompts, and what to type next."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from danceopd.data.column_names import column_notes
from danceopd.data.manifest import read_manifest
from danceopd.data.prompt_limits import notes_before
from danceopd.models.backbones import backbone_of, empty_transformer, pipeline_class_of
from danceopd.models.blocks import PRESETS, preset_layers
from danceopd.models.loading import length_of_prompts
from danceopd.models.lora_files import load_lora, lora_file, trained_for
from danceopd.models.shared_base import target_layers
from danceopd.support.errors import UserError
from danceopd.support.hints import did_you_mean
from danceopd.support.hub import hub_name
from danceopd.support.paths import draws_miniature, near_path
from danceopd.support.texts import many
from danceopd.tools.merge_loras.configuration import targets_of
from danceopd.tools.merge_loras.prompts import SHIPPED
from danceopd.tools.merge_loras.triggers import Trigger, trigger_of

BASE = "base"  # the capability that keeps the model as it is

PROMPTS = 300  # of each capability, of the general ones

SMALL = 30.0  # GiB: cards up to this get the settings of configs/models/*-24gb.yaml


@dataclass(frozen=True)
class Wishes:
    """What a user wants.

    Attributes:
        base: The pipeline: a folder, an id of the hub, or a name that ships.
        loras: Files or folders, by the capability that each is for.
        edits: The capabilities that edit pictures.
        data: A manifest whose `task` names the capabilities; general prompts if not given.
        card_gib: Memory of a card; None trains on the processor.
        gpus: Number of cards.
    """

    base: str
    loras: Mapping[str, Path]
    edits: Sequence[str] = ()
    data: Path | None = None
    card_gib: float | None = None
    gpus: int = 1


@dataclass(frozen=True)
class Proposal:
    """What is proposed.

    Attributes:
        configuration: The text of the file.
        manifest: The rows' file, as the user gave it or as it is to be written.
        rows: Its content; None where the user's own is used.
        steps: (what a command does, the command), in turn.
        warnings: Which rows will be left out or cut, a line each.
    """

    configuration: str
    manifest: Path
    rows: str | None
    steps: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def loras_in(places: Sequence[Path]) -> dict[str, Path]:
    """Finds LoRAs: files as they are, folders with one LoRA, and all those in a folder of several.

    Returns:
        {name: path}, named by their files or folders.

    Raises:
        UserError: There is none, or two have one name.
    """
    found: list[Path] = []
    for place in places:
        inside = sorted(place.iterdir()) if place.is_dir() else []
        several = [p for p in inside if p.suffix == ".safetensors" or (p.is_dir() and any(p.glob("*.safetensors")))]
        alone = place.is_dir() and any((place / name).is_file() for name in ("adapter_config.json",))
        found += several if len(several) > 1 and not alone else [place]
    named: dict[str, Path] = {}
    for path in found:
        lora_file(path)
        name = re.sub(r"\W+", "_", path.stem if path.suffix else path.name).strip("_") or "lora"
        if name in named or name == BASE:
            raise UserError(f"{path}: a source is named {name!r} already; rename the file")
        named[name] = path
    return named


def base_of(loras: Mapping[str, Path]) -> str | None:
    """Returns the model that LoRAs name as theirs; None where none does.

    Raises:
        UserError: They name several.
    """
    named = {trained: name for name, path in loras.items() if (trained := trained_for(path))}
    if len(named) > 1:
        said = ", ".join(f"{name} for {trained}" for trained, name in named.items())
        raise UserError(f"the LoRAs are for different models ({said}); give those of one, or say which by --base MODEL")
    return next(iter(named), None)


def check_base(model: Path) -> None:
    """Checks that a base is a pipeline that is here, or may be one on the hub.

    Args:
        model: Where it lies.

    Raises:
        UserError: It is neither.
    """
    if model.exists():
        backbone_of(model)
    elif hub_name(model) is None:
        near = near_path(model)
        raise UserError(f"there is no {model}{near}; give a pipeline's folder, or an id such as owner/name")


def data_for(loras: Iterable[str], edits: Iterable[str], manifest: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Reads a user's own rows, and checks that every LoRA has some.

    Args:
        loras, edits: The capabilities, and those of them that edit.
        manifest: The file.

    Returns:
        (a row's id, its prompt) of each, and what of the file will not be read, a line each.

    Raises:
        UserError: A LoRA has no row, or there is no row at all.
    """
    rows, problems = read_manifest(manifest, needs_source=edits)
    lines, tasks = {problem.line for problem in problems}, {row.capability for row in rows}
    why = f"danceopd data check {shlex.quote(str(manifest))} says why"
    if not rows:
        raise UserError(f"{manifest} has no row that can be read; {why}")
    if lack := [name for name in loras if name not in tasks]:
        left = f" ({many(len(lines), 'row')} cannot be read; {why})" if lines else ""
        raise UserError(
            f"{manifest} has no row whose task is {lack[0]}{left}; its tasks are {', '.join(sorted(tasks))}. Write "
            f"{lack[0]} as the task of the rows that this LoRA is to answer"
        )
    left = [f"{many(len(lines), 'row')} of {manifest} will be left out; {why}"] if lines else []
    return [(row.id, row.prompt) for row in rows], [*left, *column_notes(rows)]


def propose(wishes: Wishes, model: Path, output: Path, max_sequence_length: int | None = None) -> Proposal:
    """Proposes a run.

    Args:
        wishes: What the user wants.
        model: Where the base lies; it need not be there.
        output: The configuration's file, beside which the rows and the cache lie.
        max_sequence_length: Tokens of a prompt; the pipeline's own if not given.

    Returns:
        The proposal; nothing is written.

    Raises:
        UserError: The base is no pipeline or cannot edit, there is nothing to edit, or a LoRA lacks rows in the data.
    """
    check_base(model)
    for name in wishes.edits:
        if name not in wishes.loras:
            raise UserError(f"--edit names no source {name!r}{did_you_mean(name, wishes.loras)}")
    if model.exists():
        can = backbone_of(model).tasks(model)
        if wishes.edits and "edit" not in can:
            raise UserError(
                f"{wishes.base} draws from text alone; leave out --edit, or give an editing model by --base"
            )
    if wishes.edits and not wishes.data:
        raise UserError("edits need pictures: give a manifest with source_image by --data (docs/data.md)")
    triggers = {name: trigger_of(name, path, None) for name, path in wishes.loras.items() if name not in wishes.edits}
    manifest = wishes.data or output.with_name(f"{output.stem}-prompts.jsonl")
    heard = not wishes.data and any(not trigger.known for trigger in triggers.values())
    rows = None if wishes.data else _rows(triggers)
    prompts, warnings = data_for(wishes.loras, wishes.edits, wishes.data) if wishes.data else ([], [])
    prompts += [(row["id"], row["prompt"]) for row in map(json.loads, (rows or "").splitlines())]
    if model.exists():
        backbone = backbone_of(model)
        length = length_of_prompts(max_sequence_length, backbone, model)
        warnings += notes_before(backbone, model, prompts, length)
    cache = output.with_name(f"{output.stem}-cache")
    prepared = cache / f"{manifest.stem}.jsonl"
    adapter = _adapter(wishes.loras, model)
    steps = _steps(wishes, manifest, cache, output, heard)
    text = "\n".join(_lines(wishes, triggers if heard else {}, prepared, output, adapter, steps)) + "\n"
    return Proposal(text, manifest, rows, steps, warnings)


def _adapter(loras: Mapping[str, Path], model: Path) -> str:
    """Returns the student's adapter: the largest rank of the LoRAs, 8 to 128, on the layers that any of them changes.

    Where the model is not here to read them with, it has rank 32 on the family's usual layers.
    """
    if not model.exists():
        return "{rank: 32}"
    empty, pipeline_class = empty_transformer(model), pipeline_class_of(model)
    read = [load_lora(path, empty, pipeline_class, 1.0, True) for path in loras.values()]
    rank = min(128, max([8, *(a.shape[0] for lora in read for a, _, _ in lora.values())]))
    changed = set().union(*read)
    if changed <= set(target_layers(empty, backbone_of(model).LORA_TARGETS, every=False)):
        return f"{{rank: {rank}}}"
    presets = (preset for preset in PRESETS if set(preset_layers(empty, preset)) == changed)
    return f"{{rank: {rank}, targets: {next(presets, None) or json.dumps(targets_of(read, empty))}}}"


def _rows(triggers: Mapping[str, Trigger]) -> str:
    """Writes rows of general prompts: for the base as they are, for each LoRA with the words that call it."""
    prompts = [line for line in SHIPPED.read_text(encoding="utf-8").splitlines() if line.strip()][:PROMPTS]
    lines = [_row(BASE, i, prompt, prompt) for i, prompt in enumerate(prompts)]
    for name, trigger in triggers.items():
        for i, prompt in enumerate(prompts):
            called = trigger.call(prompt)
            lines.append(_row(name, i, called, called if trigger.known else prompt))
    return "".join(lines)


def _row(task: str, i: int, prompt: str, heard: str) -> str:
    return json.dumps({"id": f"{task}-{i}", "task": task, "prompt": prompt, "heard": heard}) + "\n"


def _steps(wishes: Wishes, manifest: Path, cache: Path, output: Path, heard: bool) -> list[tuple[str, str]]:
    prepare = ["danceopd", "data", "prepare", manifest, "--model", wishes.base, "--cache", cache]
    prepare += ["--texts", "{heard}"] if heard else []
    prepare += ["--needs-source", *wishes.edits] if wishes.edits else []
    config, run = ["--config", output], _run_folder(output)
    train = ["danceopd", "train", *config]
    if wishes.gpus > 1:
        train = ["deepspeed", "--num_gpus", str(wishes.gpus), "--module", "danceopd", "train", *config]
    steps = [
        ("encode the prompts and pictures, once", prepare),
        ("say what the run takes and lacks; no weight is loaded", ["danceopd", "train", *config, "--dry-run"]),
        ("train; the same command goes on where a run stopped", train),
        ("look at it while it trains", ["danceopd", "watch", run]),
        ("measure how far the student is from its sources", ["danceopd", "report", run]),
        ("write the student for diffusers and other tools", ["danceopd", "export", run, "-o", f"{output.stem}-lora"]),
    ]
    return [(what, " ".join(shlex.quote(str(part)) for part in command)) for what, command in steps]


def _run_folder(output: Path) -> Path:
    return Path("runs") / output.stem


def _lines(wishes: Wishes, plain: Mapping[str, Trigger], prepared: Path, output: Path, adapter: str, steps):
    """Yields the configuration, line by line."""
    names = ", ".join(wishes.loras)
    yield f"# One LoRA of {wishes.base} that does what {names} do. Written by danceopd init; every key may be changed."
    yield "#"
    for number, (what, command) in enumerate(steps, 1):
        yield f"# {number}. {what}:"
        yield f"#    {command}"
    yield ""
    yield f"model: {json.dumps(wishes.base)}"
    yield "student:"
    yield "  init_from: merge  # begins as the mean of all sources, which is nearer to each than the base is"
    yield f"  lora: {adapter}"
    yield ""
    yield "# What the student learns from: each is frozen."
    yield "sources:"
    yield f"  {BASE}: {{}}  # the model itself: it keeps prompts without a trigger as they are"
    for name, path in wishes.loras.items():
        yield f"  {name}: {{lora: [{{path: {json.dumps(str(path))}, scale: 1.0}}]}}"
    for name, trigger in plain.items():
        if not trigger.known:
            asked = f"{{teacher_at: {{source: {name}, prompt: '{{heard}}'}}}}"
            yield f"  {name}_plain: {asked}  # its file names no trigger"
    yield ""
    yield "# Which source answers for which rows of the data. A larger weight draws more of the samples."
    yield "capabilities:"
    data = f"data: {{prepared: {json.dumps(str(prepared))}}}"
    if not wishes.data:
        yield f"  {BASE}: {{source: {BASE}, task: t2i, {data}, weight: 0.5, prompt_dropout: 0.2}}"
    for name in wishes.loras:
        source = f"{name}_plain" if name in plain and not plain[name].known else name
        yield f"  {name}: {{source: {source}, task: {'edit' if name in wishes.edits else 't2i'}, {data}}}"
    yield ""
    yield "rollout: {num_inference_steps: 16}  # steps of the student's own trajectory"
    yield ""
    yield "training:"
    for key, value, why in _training(wishes, output):
        yield f"  {key}: {value}{f'  # {why}' if why else ''}"


def _training(wishes: Wishes, output: Path):
    """Yields (key, value, comment) of the section training."""
    small, cpu = draws_miniature(Path(wishes.base)), wishes.card_gib is None
    each = 1 if not small else 16
    batch = (16 if small else 4) * max(1, wishes.gpus)
    yield "output_dir", json.dumps(str(_run_folder(output))), ""
    yield "max_steps", 400 if small else 1000, "updates"
    yield "batch_size", batch, "samples of an update, over all cards"
    if batch > each * wishes.gpus:
        yield "gradient_accumulation_steps", batch // (each * wishes.gpus), f"{each} at a time on each card"
    if not cpu and wishes.card_gib <= SMALL and wishes.gpus == 1:
        yield "optimizer", "adamw_8bit", "for a small card; needs pip install 'danceopd[8bit]'"
    yield "learning_rate", "1.0e-3" if small else "2.0e-4", ""
    yield "precision", "fp32" if cpu else "bf16", ""
    if not small:
        yield "gradient_checkpointing", "true", "computes blocks again in the backward instead of keeping them"
    if not cpu and wishes.card_gib <= SMALL and wishes.gpus == 1:
        yield "base_precision", "auto", "stores the frozen weights in fewer bits where they do not fit in 16"
    yield "save_every", 100, "a checkpoint, and the student beside it"
    yield "sample_every", 100, "a grid of pictures of the student and its sources"
