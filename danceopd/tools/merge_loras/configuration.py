"""Writes the configuration of a merge's training, and the rows that it asks about."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from danceopd.config.reading import parse_config
from danceopd.config.sections import Config
from danceopd.models.lora_algebra import Lora
from danceopd.models.shared_base import target_layers
from danceopd.support.errors import UserError
from danceopd.tools.merge_loras.given import Given, Options
from danceopd.tools.merge_loras.prompts import Route

HEARD = "{heard}"  # the column of what a source is asked with, where that is not the result's prompt


def manifest_of(routes: Sequence[Route]) -> tuple[str, bytes]:
    """Writes the manifest of all routes.

    Args:
        routes: Who is asked what.

    Returns:
        Its name, which says its content, since other prompts are another run; and the content.
    """
    rows = [
        {"id": f"{route.name} {i}", "task": route.name, "prompt": prompt, "heard": heard}
        for route in routes
        for i, (prompt, heard) in enumerate(route.rows)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return f"prompts-{hashlib.blake2b(data, digest_size=4).hexdigest()}.jsonl", data


def heard_otherwise(routes: Sequence[Route]) -> bool:
    """Tells whether any source hears anything but the result's prompt."""
    return any(prompt != heard for route in routes for prompt, heard in route.rows)


def configuration(given: Given, options: Options, routes: Sequence[Route], work: Path, manifest: str) -> dict:
    """Writes the configuration as plain values: each route is a capability, and its source one or several LoRAs.

    Args:
        given: What the user gave.
        options: How it is merged.
        routes: Who is asked what.
        work: The folder of the run and the prompts.
        manifest: The name of the prepared rows.

    Returns:
        The values.
    """
    # What diffusers' pipelines call guidance_scale is an input of a model that embeds it, and an operator for others.
    embeds = getattr(given.empty.config, "guidance_embeds", False)
    embedded, scale = (options.guidance_scale, 1.0) if embeds else (None, options.guidance_scale)
    asked = {"guidance_scale": scale, "embedded_guidance": embedded}
    sources: dict[str, dict] = {"base": {"weights": "base", **asked}}
    for name, path in given.paths.items():
        sources[name] = {"lora": [{"path": str(path), "scale": given.weights[name]}], **asked}
    capabilities, otherwise = {}, heard_otherwise(routes)
    for route in routes:
        source = " + ".join(route.loras) or "base"
        if len(route.loras) > 1:
            sources[source] = {"compose": {"base": "base", "sources": dict.fromkeys(route.loras, 1.0)}}
        if otherwise:  # of all of them: one source is compared on another's prompts too
            source, of = f"{source}, by its own words", source
            sources[source] = {"teacher_at": {"source": of, "prompt": HEARD}}
        capabilities[route.name] = {
            "source": source,
            "task": "t2i",
            "data": {"prepared": str(work / "cache" / manifest)},
            "weight": route.weight,
            "student_guidance_scale": scale,
            "prompt_dropout": route.empty,
        }
    return {
        "model": str(given.base),
        "student": {
            "init_from": "merge",
            "lora": {"rank": given.rank, "targets": targets_of(given.loras.values(), given.empty)},
            "embedded_guidance": embedded,
        },
        "sources": sources,
        "capabilities": capabilities,
        "training": {
            "output_dir": str(work / f"rank-{given.rank}"),
            "max_steps": options.steps,
            "batch_size": 4,
            "learning_rate": 2e-4,
            "sample_every": 0,
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
        },
    }


OWN = {  # what the command itself says, and by which option
    "model": "--base",
    "student.lora.rank": "--rank",
    "student.lora.targets": "the LoRAs, whose layers they are",
    "student.init_from": "the LoRAs, whose mean is the start",
    "student.embedded_guidance": "--guidance-scale",
    "sources": "the LoRAs, --weight and --guidance-scale",
    **dict.fromkeys(
        (f"capabilities.*.{key}" for key in ("source", "task", "data", "student_guidance_scale")),
        "--prompts, --trigger, --no-pairs and --guidance-scale",
    ),
    "training.output_dir": "--work",
    "training.max_steps": "--steps",
}


def check_overrides(config: Config, raw: dict, overrides: Sequence[str]) -> None:
    """Refuses changes of the training that go against what the command's own options say.

    Args:
        config: The configuration as it is with them.
        raw: The plain values without them.
        overrides: The changes, as key.sub=value.

    Raises:
        UserError: There are some; each is named with what to give in its place.
    """
    before, now, problems = parse_config(raw, [], "this merge").to_dict(), config.to_dict(), []
    keys = [
        (key.replace("*", name), option)
        for key, option in OWN.items()
        for name in (dict.fromkeys([*raw["capabilities"], *config.capabilities]) if "*" in key else [""])
    ]
    for key, option in keys:
        if _at(before, key) != _at(now, key):
            texts = [text for text in overrides if _touches(text.partition("=")[0].strip(), key)]
            problems.append(f"{' '.join(texts)}: {key} is given by {option}; leave the change out")
    if problems:
        raise UserError("\n  ".join(["this merge cannot be changed so:", *dict.fromkeys(problems)]))


def _at(values: dict, key: str) -> object:
    """Returns the value of a dotted key; None where a section of it is left out."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _touches(given: str, key: str) -> bool:
    return f"{given}.".startswith(f"{key}.") or f"{key}.".startswith(f"{given}.")


def targets_of(loras: Iterable[Lora], transformer: nn.Module) -> list[str]:
    """Returns the student's targets: the layers that any LoRA changes, by their ends in a block where that says it."""
    names = sorted({name for lora in loras for name in lora})
    ends = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in names})
    return ends if set(target_layers(transformer, ends)) == set(names) else names
