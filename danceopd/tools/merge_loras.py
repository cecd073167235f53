"""Distils several LoRAs of one model into one of the size of one, by the trainer, from prompts alone."""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from danceopd.config.reading import parse_config
from danceopd.config.sections import Config
from danceopd.core.conditioning import placed
from danceopd.core.distance import velocity_error
from danceopd.core.fields import Field, guided
from danceopd.core.rollout import sample
from danceopd.data.prepare import prepare
from danceopd.data.prepared import PreparedData
from danceopd.models.backbones import backbone_of, combine_of, empty_transformer, pipeline_class_of
from danceopd.models.lora_algebra import Lora, average
from danceopd.models.lora_files import FILES, add_metadata, load_lora
from danceopd.models.precision import PRECISIONS
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.weights import of_folder
from danceopd.support.devices import find_device
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.hints import did_you_mean
from danceopd.support.pictures import labelled_grid
from danceopd.support.texts import lines_of, read_text
from danceopd.tools.provenance import provenance
from danceopd.training.assembly.build import build_model
from danceopd.training.loop import train

AVERAGE, STUDENT = "weight average", "distilled"

COMPARED = 4  # prompts of each LoRA that errors are measured on

SHOWN = 2  # of them in the grid

DROPOUT = 0.1  # share of empty prompts, so that guidance works on the result

CELL = 160  # least width of a picture in the grid, in pixels


@dataclass(frozen=True)
class Merged:
    """What came of a merge.

    Attributes:
        path: The adapter's file.
        grid: The picture that compares it.
        errors: {LoRA: {"weight average": error, "distilled": error}}: the mean squared difference of velocities from
            the LoRA's, on the trajectories of the one compared.
    """

    path: Path
    grid: Path
    errors: dict[str, dict[str, float]]


# Long: a third of it says what its arguments are.
def merge_loras(
    base: Path,
    loras: Sequence[Path],
    prompts: Path,
    output: Path,
    *,
    triggers: Sequence[str] = (),
    rank: int | None = None,
    steps: int = 1000,
    resolution: int = 1024,
    guidance_scale: float = 1.0,
    work: Path | None = None,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
) -> Merged:
    """Distils LoRAs of one pipeline into one adapter, written as diffusers does, with a grid of pictures beside it.

    Args:
        base: The pipeline's folder.
        loras: Two LoRAs or more. Each is called as its file, or as its folder where the file has the usual name.
        prompts: A file of one prompt a line, for all LoRAs with their triggers in front, or for one of them as
            LORA<TAB>PROMPT.
        output: The .safetensors file to write.
        triggers: "LORA=WORDS", put in front of the LoRA's prompts.
        rank: Of the result; the largest of the LoRAs' if not given.
        steps: Number of updates.
        resolution: Sides of the pictures in pixels.
        guidance_scale: That LoRAs and result are drawn with; a model's input where it embeds one.
        work: Folder of the encoded prompts and the run, which the same call goes on from after an interruption.
        overwrite: Whether to start again where another run lies.
        overrides: Of the training's configuration, as key.sub=value.

    Returns:
        Where the adapter and the grid are, and how far it is from each LoRA.

    Raises:
        UserError: Something is missing or does not fit; said before anything is encoded.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"{output} must end in .safetensors: it is the file to write")
    backbone = backbone_of(base)
    backbone.latent_shape(base, resolution, resolution)
    named = name_loras(loras)
    asked = read_prompts(prompts, list(named), read_triggers(triggers, list(named)))
    empty = empty_transformer(base)
    adapters = _load(named, empty, base)
    manifest, rows = manifest_of(asked)
    work = work or output.with_suffix(".work")
    cache = work / "cache"
    raw = _configuration(base, named, adapters, empty, work, manifest, rank, steps, guidance_scale)
    config = parse_config(raw, list(overrides), "this merge")
    device = find_device(config.training.device)
    dtype = PRECISIONS[config.training.precision]
    write_atomic(work / manifest, rows)
    options = {"resolution": resolution, "device": str(device), "dtype": dtype, "on_bad_row": "refuse"}
    for note in prepare(work / manifest, base, cache, **options).notes:
        print(f"warning: {note}", file=sys.stderr)
    student = train(config, build_model, overwrite) / "student" / FILES[1]
    adapters[AVERAGE] = average(list(adapters.values()))
    adapters[STUDENT] = load_lora(student, empty, pipeline_class_of(base))
    errors, grid = _compare(config, backbone, adapters, asked, resolution, device)
    write_atomic(output.with_suffix(".png"), grid)
    write_atomic(output, student.read_bytes())
    add_metadata(output, provenance(config, [words.partition("=")[2].strip() for words in triggers]))
    return Merged(output, output.with_suffix(".png"), errors)


def _configuration(
    base: Path,
    named: dict[str, Path],
    adapters: dict[str, Lora],
    empty: nn.Module,
    work: Path,
    manifest: str,
    rank: int | None,
    steps: int,
    guidance_scale: float,
) -> dict:
    """Returns the configuration of the training as plain values: each LoRA is a source and a capability."""
    cuda = torch.cuda.is_available()
    # What diffusers' pipelines call guidance_scale is an input of a model that embeds it, and an operator for others.
    embeds = getattr(empty.config, "guidance_embeds", False)
    embedded, scale = (guidance_scale, 1.0) if embeds else (None, guidance_scale)
    largest = max(len(a) for lora in adapters.values() for a, _, _ in lora.values())
    whole = [n for n, lora in adapters.items() if any(len(a) >= min(len(b), a.shape[1]) for a, b, _ in lora.values())]
    if rank is None and whole:
        raise UserError(f"{', '.join(whole)} changes layers in their full rank, of up to {largest}; give --rank")
    return {
        "model": str(base),
        "student": {
            "lora": {
                "rank": largest if rank is None else rank,
                "targets": targets_of(adapters.values(), empty),
            },
            "embedded_guidance": embedded,
        },
        "sources": {
            name: {"lora": [{"path": str(path)}], "guidance_scale": scale, "embedded_guidance": embedded}
            for name, path in named.items()
        },
        "capabilities": {
            name: {
                "source": name,
                "task": "t2i",
                "data": {"prepared": str(work / "cache" / manifest)},
                "student_guidance_scale": scale,
                "prompt_dropout": DROPOUT,
            }
            for name in named
        },
        "training": {
            "output_dir": str(work / "run"),
            "max_steps": steps,
            "batch_size": 4,
            "learning_rate": 2e-4,
            "sample_every": 0,
            "precision": "bf16" if cuda else "fp32",
        },
    }


def name_loras(paths: Sequence[Path]) -> dict[str, Path]:
    """Names LoRAs by their files without the ending, or by their folders; a UserError for one name of two."""
    if len(paths) < 2:
        raise UserError("a merge needs two LoRAs at least; give --lora for each of them")
    named: dict[str, Path] = {}
    for path in paths:
        whole = path.resolve()
        name = (
            whole.parent.name if whole.name in FILES else whole.stem if whole.suffix == ".safetensors" else whole.name
        )
        if name in named or name in (AVERAGE, STUDENT):
            raise UserError(f"two LoRAs would be called {name!r}, {path} the second; rename its file or folder")
        named[name] = path
    return named


def read_triggers(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Reads {name: words} from "NAME=WORDS"; a UserError for another form or an unknown name."""
    triggers = {}
    for text in given:
        name, equals, words = text.partition("=")
        if not equals or not words.strip():
            raise UserError(f"--trigger {text!r} is not of the form LORA=WORDS")
        if name not in names:
            raise UserError(f"--trigger {text!r}: no LoRA {name!r}{did_you_mean(name, names)}")
        triggers[name] = words.strip()
    return triggers


def read_prompts(path: Path, names: Sequence[str], triggers: dict[str, str]) -> dict[str, list[str]]:
    """Reads {name: prompts} as they will be asked, each once; a UserError lists the lines that are of no use."""
    lines = lines_of(read_text(path, "file of prompts"))
    asked: dict[str, dict[str, None]] = {name: {} for name in names}
    problems = []
    for number, line in lines:
        name, tab, prompt = line.partition("\t")
        if not tab:
            for lora in names:
                asked[lora][f"{triggers.get(lora, '')} {line.strip()}".strip()] = None
        elif name.strip() not in names:
            problems.append(f"line {number}: no LoRA {name.strip()!r}{did_you_mean(name.strip(), names)}")
        elif not prompt.strip():
            problems.append(f"line {number}: no prompt after {name.strip()!r}")
        else:
            asked[name.strip()][prompt.strip()] = None
    problems += [f"no prompt for {name}" for name, own in asked.items() if not own and not problems]
    if problems:
        raise UserError("\n  ".join([f"{path} cannot be used:", *problems]))
    first, *others = asked.values()
    shared = set(first).intersection(*others)
    if shared:
        print(
            f"warning: {len(shared)} prompts are asked of every LoRA in the same words, where the result can only be "
            "their mean; give --trigger, or LORA<TAB>PROMPT",
            file=sys.stderr,
        )
    return {name: list(own) for name, own in asked.items()}


def _load(named: dict[str, Path], empty: nn.Module, base: Path) -> dict[str, Lora]:
    loaded, problems, weights = {}, [], of_folder(base)
    for name, path in named.items():
        try:
            loaded[name] = load_lora(path, empty, pipeline_class_of(base), base=weights)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n  ".join(["these LoRAs cannot be merged:", *problems]))
    return loaded


def manifest_of(asked: dict[str, list[str]]) -> tuple[str, bytes]:
    """Returns (name, content) of the manifest: called after its content, since other prompts are another run."""
    rows = [
        {"id": f"{name} {i}", "task": name, "prompt": prompt}
        for name, own in asked.items()
        for i, prompt in enumerate(own)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return f"prompts-{hashlib.blake2b(data, digest_size=4).hexdigest()}.jsonl", data


def targets_of(loras: Iterable[Lora], transformer: nn.Module) -> list[str]:
    """Returns the student's targets: the layers that any LoRA changes, by their ends in a block where that says it."""
    names = sorted({name for lora in loras for name in lora})
    ends = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in names})
    return ends if set(target_layers(transformer, ends)) == set(names) else names


def fields_of(
    config: Config, backbone: ModuleType, adapters: dict[str, Lora], empty_prompt, device
) -> dict[str, Field]:
    """Makes the fields of adapters on one base, guided as the student's are."""
    transformer = backbone.load_transformer(config.model, PRECISIONS[config.training.precision]).to(device)
    shared = SharedBase(transformer, list(adapters.values()), backbone.velocity)
    scale = next(iter(config.capabilities.values())).student_guidance_scale
    combination = combine_of(config.model)
    return {name: guided(shared.field(i), empty_prompt, scale, combination) for i, name in enumerate(adapters)}


def _compare(
    config: Config,
    backbone: ModuleType,
    adapters: dict[str, Lora],
    asked: dict[str, list[str]],
    resolution: int,
    device,
) -> tuple[dict[str, dict[str, float]], bytes]:
    """Returns (errors as in Merged, the grid as PNG), a prompt at a time, so that what trains fits here too."""
    prepared = next(iter(config.capabilities.values())).data.prepared
    data = {name: PreparedData(prepared, name) for name in asked}
    empty_prompt = placed(next(iter(data.values())).empty_prompt(), device)
    fields = fields_of(config, backbone, adapters, empty_prompt, device)
    sigmas = backbone.sigmas(config.model, config.rollout.num_inference_steps, resolution, resolution)
    shape = backbone.latent_shape(config.model, resolution, resolution)
    generator = torch.Generator().manual_seed(config.training.seed)
    errors: dict[str, dict[str, float]] = {}
    drawn: list[tuple[str, list[torch.Tensor]]] = []
    for name, rows in data.items():
        measured: dict[str, list[float]] = {AVERAGE: [], STUDENT: []}
        for i in range(min(COMPARED, len(rows))):
            noise = torch.randn(1, *shape, generator=generator).to(device)
            conditioning = rows.condition([i], [False]).to(device).embedding(config.student.embedded_guidance)
            for who, found in measured.items():
                found.append(velocity_error(fields[who], fields[name], noise, conditioning, sigmas))
            if i < SHOWN:
                latents = [sample(f, noise, conditioning, sigmas, config.rollout.solver) for f in fields.values()]
                drawn.append((asked[name][i], latents))
        errors[name] = {who: sum(found) / len(found) for who, found in measured.items()}
    columns = list(fields)
    del fields
    _, decode = backbone.picture_codec(config.model, device, PRECISIONS[config.training.precision])
    rows = [(prompt, [decode(x)[0] for x in latents]) for prompt, latents in drawn]
    return errors, labelled_grid(rows, columns, least=CELL)
