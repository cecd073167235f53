"""Reads what a user gives to merge-loras; all mistakes are told at once."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

from torch import nn

from danceopd.models.backbones import backbone_of, empty_transformer, pipeline_class_of
from danceopd.models.loading import length_of_prompts
from danceopd.models.lora_algebra import Lora
from danceopd.models.lora_files import FILES, load_lora, lora_file, save_lora
from danceopd.models.lora_layouts import layouts_of
from danceopd.models.lora_merges import automatic_rank
from danceopd.models.weights import of_folder
from danceopd.support.errors import UserError
from danceopd.support.files import check_writable
from danceopd.support.hints import did_you_mean
from danceopd.support.hub import hub_name, located
from danceopd.support.texts import many
from danceopd.tools.merge_loras.checkpoints import check_checkpoint, digest_of, extracted, is_checkpoint
from danceopd.tools.merge_loras.prompts import PLAIN, SHIPPED, Prompts, notes_on, read_prompts, without_triggers
from danceopd.tools.merge_loras.triggers import Trigger, metadata_of, trigger_of, triggers_in
from danceopd.tools.provenance import content_hash
from danceopd.training.assembly.parts import Problems

RESERVED = ("base", PLAIN, "merge", "student")  # what the run and the tables call otherwise

PLAIN_MERGE = ".peft.safetensors"  # the ending of the file of PEFT's best merge, beside the result

PAGE = ".html"  # of the page that compares them


@dataclass(frozen=True)
class Options:
    """How LoRAs are merged.

    Attributes:
        prompts: A file of prompts; the shipped one if not given.
        triggers: "NAME=WORDS".
        weights: "NAME=NUMBER", or "NAME:LAYERS=NUMBER" for the layers of these names, in which * stands for anything.
        pairs: Whether two triggers together ask for both LoRAs.
        rank: Of the result; "auto" for the one of danceopd.models.lora_merges.automatic_rank, None for the largest of
            the LoRAs'.
        steps: Most updates.
        patience: Scorings without growth after which training ends; 0 for never.
        resolution: Sides of the pictures in pixels.
        max_sequence_length: Tokens of a prompt; the pipeline's own if not given.
        guidance_scale: That LoRAs and result are drawn with; a model's input where it embeds one.
        layout: "diffusers", "comfyui" or "kohya".
        work: Folder of the encoded prompts and the run; OUTPUT.work if not given.
        overwrite: Whether to start again where another run lies.
        overrides: Of the training's configuration, as key.sub=value.
    """

    prompts: Path | None = None
    triggers: Sequence[str] = ()
    weights: Sequence[str] = ()
    pairs: bool = True
    rank: int | str | None = None
    steps: int = 1000
    patience: int = 4
    resolution: int = 1024
    max_sequence_length: int | None = None
    guidance_scale: float = 1.0
    layout: str = "diffusers"
    work: Path | None = None
    overwrite: bool = False
    overrides: Sequence[str] = ()


@dataclass
class Given:
    """What was given, read.

    Attributes:
        base: The pipeline's folder.
        backbone: The module of its family.
        empty: Its transformer without values.
        paths: Of the LoRAs by name.
        triggers, weights: Of each of them.
        layers: The weights of layers, as they were given, by name.
        loras: What each adds, weighted.
        prompts: The prompts.
        rank: Of the result.
        notes: What a user should know, a line each.
    """

    base: Path
    backbone: ModuleType
    empty: nn.Module
    paths: dict[str, Path]
    triggers: dict[str, Trigger]
    weights: dict[str, float]
    layers: dict[str, list[str]]
    loras: dict[str, Lora]
    prompts: Prompts
    rank: int
    notes: list[str] = field(default_factory=list)


# Long: each mistake is noted, and the rest is still looked at.
def read(base: Path, loras: Sequence[Path], output: Path, options: Options, work: Path | None = None) -> Given:
    """Reads and checks all that a merge needs, before anything is encoded.

    Args:
        base: The pipeline's folder, or an id of the hub.
        loras: Files, folders or ids of the hub.
        output: The .safetensors file to write.
        options: The rest.
        work: Where LoRAs are written that are made of checkpoints and of weighed layers; the work folder if not given.

    Returns:
        What was read.

    Raises:
        UserError: Lists every mistake.
    """
    problems, notes = Problems(), []
    attempt = problems.attempt
    if output.suffix != ".safetensors":
        problems.append(f"-o {output}: must end in .safetensors: it is the file to write")
    elif output.is_dir():
        problems.append(f"-o {output}: is a folder; give the file to write")
    else:
        attempt("-o", check_writable, output.parent)
    if options.work:
        attempt("--work", check_writable, options.work)
    base = attempt("--base", located, base)
    backbone = base and attempt("--base", backbone_of, base)
    empty = backbone and attempt("--base", empty_transformer, base)
    if empty is not None:
        attempt("--resolution", backbone.latent_shape, base, options.resolution, options.resolution)
        attempt("--max-sequence-length", length_of_prompts, options.max_sequence_length, backbone, base)
        family = backbone.__name__.rpartition(".")[2]
        others = [layout for layout in layouts_of(family) if layout != "peft"]  # which is a folder
        if options.layout not in others:
            problems.append(f"--layout {options.layout}: not written for {family}; give {' or '.join(others)}")
    paths = _paths(loras, attempt, notes)
    problems += _in_the_way(output, base, paths)
    read_loras = {}
    checkpoints = [name for name, path in paths.items() if is_checkpoint(path)]
    for name, path in paths.items() if empty is not None else ():
        if name in checkpoints:
            attempt(str(path), check_checkpoint, path, empty)
        else:
            read_loras[name] = attempt(str(path), _whole, path, base, empty)
    of_layers = [text for text in options.weights if ":" in text.partition("=")[0]]
    whole = [text for text in options.weights if text not in of_layers]
    texts = _assigned("--weight", whole, paths, problems)
    numbers = {name: attempt(f"--weight {name}={text}", _weight, text) for name, text in texts.items()}
    _layered(of_layers, read_loras, paths, problems)
    triggers = _triggers(options, paths, problems, notes)
    prompts = attempt("--prompts", read_prompts, options.prompts or SHIPPED, list(paths))
    if prompts is not None:
        prompts, line = attempt("--prompts", without_triggers, prompts, triggers) or (prompts, "")
        notes += [line] if line else []
        notes += notes_on(prompts, triggers)
    if not 0 < options.guidance_scale < math.inf:
        problems.append(
            f"--guidance-scale {options.guidance_scale:g}: must be a finite number above 0; 1 is without guidance"
        )
    if options.steps < 1:
        problems.append("--steps: must be at least 1")
    if options.patience < 0:
        problems.append("--patience: must be at least 0, which is never to end early")
    if isinstance(options.rank, int) and options.rank < 1:
        problems.append("--rank: must be at least 1, or auto")
    if len(paths) < 2:
        problems.append("a merge needs two LoRAs at least; name their files one after another")
    _stop(problems, notes)
    work = work or options.work or output.with_suffix(".work")
    for name in checkpoints:
        paths[name], read_loras[name], line = extracted(paths[name], base, empty, pipeline_class_of(base), work)
        notes.append(f"{name}: {line}")
    layered = _layered(of_layers, read_loras, paths, problems)  # of checkpoints too, whose layers are known now
    _stop(problems, notes)
    for name, lora in layered.items():
        content = hashlib.blake2b(json.dumps([_content(paths[name]), *of_layers]).encode(), digest_size=8).hexdigest()
        paths[name], read_loras[name] = work / "weighted" / f"{name}-{content}", lora
        save_lora(lora, paths[name], pipeline_class_of(base))
    weights = {name: numbers.get(name, 1.0) for name in paths}
    weighted = {
        name: {layer: (a, b, scale * weights[name]) for layer, (a, b, scale) in read_loras[name].items()}
        for name in paths
    }
    if prompts.twice:
        lines = many(prompts.twice, "line")
        notes.append(
            f"{lines} of {options.prompts or SHIPPED} stood there before, and what is there twice is taken once"
        )
    rank = options.rank
    full = [
        name for name, lora in weighted.items() if any(len(a) >= min(len(b), len(a[0])) for a, b, _ in lora.values())
    ]
    if rank == "auto" or (rank is None and full):
        rank = automatic_rank(list(weighted.values()))
        if options.rank is None:
            notes.append(f"{', '.join(full)}: changes layers in their full rank; the result has that of --rank auto")
    elif rank is None:
        rank = max(len(a) for lora in weighted.values() for a, _, _ in lora.values())
    layers = {name: [text.partition(":")[2] for text in of_layers if text.startswith(f"{name}:")] for name in paths}
    return Given(base, backbone, empty, paths, triggers, weights, layers, weighted, prompts, rank, notes)


def beside(output: Path) -> list[Path]:
    """Lists what is written beside the merged file."""
    return [output.with_suffix(PLAIN_MERGE), output.with_suffix(PAGE)]


def _in_the_way(output: Path, base: Path | None, paths: dict[str, Path]) -> list[str]:
    """Says where the file to write would take an input's place, or lie among the files of a model or LoRA."""
    file, found = output.resolve(), []
    for path in filter(None, (base, *paths.values())):
        if path.is_file() and path.resolve() in (file, *beside(file)):
            found.append(f"-o {output}: is an input, which it would overwrite; give another file")
        elif path.is_dir() and file.is_relative_to(path.resolve()):
            found.append(f"-o {output}: lies in {path}, which is an input; give a file elsewhere")
    return found


def _stop(problems: Problems, notes: list[str]) -> None:
    """Raises a UserError that lists what is wrong, if anything is; notes, which mend nothing, stand below it."""
    if problems:
        wrong = "\n  ".join(["these LoRAs cannot be merged yet:", *(_one_line(line) for line in problems)])
        raise UserError("\n".join([wrong, *(f"note: {note}" for note in notes)]))


def _one_line(problem: str) -> str:
    """Leaves a path out that a message repeats."""
    key, colon, message = problem.partition(": ")
    return f"{key}{colon}{message.removeprefix(f'{key}: ')}"


def _whole(path: Path, base: Path, empty: nn.Module) -> Lora:
    """Reads a LoRA, a DoRA by the base's weights; a UserError where it changes nothing."""
    lora = load_lora(path, empty, pipeline_class_of(base), base=of_folder(base))
    if not _adds(lora):
        raise UserError(f"{path}: changes nothing, for its factors are zero; leave it out")
    return lora


def _adds(lora: Lora) -> bool:
    """Tells whether a LoRA changes anything."""
    return any(a.any() and b.any() and scale for a, b, scale in lora.values())


def _paths(given: Sequence[Path], attempt: Callable, notes: list[str]) -> dict[str, Path]:
    """Finds the LoRAs and names them; what is given twice is taken once."""
    found: list[tuple[Path, Path]] = []
    contents: dict[str, Path] = {}
    for path in given:
        there = attempt(str(path), located, path)
        if there is None:
            continue
        inside = there / "transformer"
        if not is_checkpoint(there) and is_checkpoint(inside) and not any(there.glob("*.safetensors")):
            there = inside
        try:
            content = _content(there)
        except UserError:  # said with everything else where it is read; nothing is the same as what is not there
            found.append((path, there))
            continue
        if content in contents:
            again = "given twice" if contents[content] == path else f"the same LoRA as {contents[content]}"
            notes.append(f"{path} is {again}, and taken once; --weight NAME=2 takes twice as much of it")
            continue
        contents[content] = path
        found.append((path, there))
    return dict(zip(names_of([path for path, _ in found]), (there for _, there in found), strict=True))


def _content(path: Path) -> str:
    """Names the content of a checkpoint, or of a LoRA's file wherever it lies; a UserError where there is neither."""
    return digest_of(path) if is_checkpoint(path) else content_hash(lora_file(path))


def names_of(paths: Sequence[Path]) -> list[str]:
    """Names LoRAs by their files without the ending, or by their folders; of equal names by more of their paths."""
    parts = [_parts(path) for path in paths]
    names = [_joined(own[-1:]) for own in parts]
    for longer in range(2, 1 + max(map(len, parts), default=0)):
        clash = {name for name in names if names.count(name) > 1 or name in RESERVED}
        names = [_joined(own[-longer:]) if name in clash else name for name, own in zip(names, parts, strict=True)]
    taken: list[str] = []
    for name in names:
        number, free = 2, name
        while free in taken or free in RESERVED:
            number, free = number + 1, f"{name}-{number}"
        taken.append(free)
    return taken


def _joined(parts: Sequence[str]) -> str:
    return re.sub(r"[\s+=:]+", "-", "-".join(parts)).strip("-") or "lora"


def _parts(path: Path) -> list[str]:
    """Lists what a LoRA may be called by, the likeliest last."""
    named = hub_name(path)
    if named and not path.exists():
        return [*named.repo.split("/"), *([Path(named.file).stem] if named.file else [])]
    whole = path.expanduser().absolute()
    parts = [part for part in whole.parts[:-1] if part != whole.anchor]
    if whole.name in FILES or whole.name in ("transformer", "unet"):
        return parts or [whole.stem]
    return [*parts, whole.stem if whole.suffix == ".safetensors" else whole.name]


def _meant(name: str, names: Collection[str]) -> str:
    """Ends a message about a name of no LoRA; of several files of that name their longer names are said."""
    longer = [other for other in names if name and other.endswith(f"-{name}")]
    if len(longer) > 1:
        return f"; the files of that name are called {' and '.join(map(repr, longer))}"
    return did_you_mean(name, names)


def _assigned(option: str, given: Sequence[str], names: dict, problems: Problems) -> dict[str, str]:
    """Reads NAME=VALUE, each name once."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals:
            problems.append(f"{option} {text}: is not of the form NAME=VALUE, NAME one of {', '.join(names)}")
        elif name not in names:
            problems.append(f"{option} {text}: no LoRA {name!r}{_meant(name, names)}")
        elif name in found and found[name] != value:
            problems.append(f"{option} {text}: {name} has {found[name]!r} already; give one of them")
        else:
            found[name] = value
    return found


def _weight(text: str, least: float = 1e-6) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise UserError("is no number") from None
    if not least <= weight < 100:
        raise UserError(
            "must be above 0 and below 100, and 1 is the LoRA as it is; leave out a LoRA that is not wanted"
        )
    return weight


def _layered(given: Sequence[str], loras: dict[str, Lora | None], names: dict, problems: Problems) -> dict[str, Lora]:
    """Weighs the layers of LoRAs by their names; those of a LoRA that is not read yet are left out."""
    found: dict[str, Lora] = {}
    for text in given:
        place, _, number = text.partition("=")
        name, _, pattern = place.partition(":")
        lora = found.get(name) or loras.get(name)
        weight = problems.attempt(f"--weight {text}", _weight, number, 0.0)
        if name not in names:
            problems.append(f"--weight {text}: no LoRA {name!r}{_meant(name, names)}")
        if lora is None or weight is None:
            continue
        named = [layer for layer in lora if fnmatchcase(layer, pattern)]
        if not named:
            problems.append(f"--weight {text}: no layer of {name} is called so; there is {next(iter(lora))}")
        found[name] = lora | {layer: (*lora[layer][:2], lora[layer][2] * weight) for layer in named}
    for name, lora in found.items():
        if not _adds(lora):
            problems.append(f"--weight: all layers that {name} changes have weight 0; leave {name} out")
    return found


def _triggers(options: Options, paths: dict[str, Path], problems: Problems, notes: list[str]) -> dict[str, Trigger]:
    """Finds what calls each LoRA; two cannot be called by the same words."""
    given = _assigned("--trigger", options.triggers, paths, problems)
    found: dict[str, Trigger] = {}
    for name, path in paths.items():
        trigger = problems.attempt(f"--trigger {name}", trigger_of, name, path, given.get(name))
        if trigger is None:
            continue
        if name not in given and len(own := triggers_in(metadata_of(path))) > 1:
            notes.append(
                f"{name} is a merged LoRA that holds {len(own)}, called by {' and by '.join(map(repr, own.values()))}; "
                f"here {trigger.words!r} calls all of them at once, and --trigger {name}=WORDS one of them"
            )
        for other, earlier in found.items():
            if trigger.words and trigger.call("").casefold() == earlier.call("").casefold():
                problems.append(
                    f"--trigger: {other} and {name} are both called by {trigger.words!r} (by {earlier.origin} and "
                    f"{trigger.origin}); give one of them other words, or none (--trigger {name}=) to be always there"
                )
        found[name] = trigger
    return found
