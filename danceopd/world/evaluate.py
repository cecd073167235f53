"""Evaluates a finished run: every row of its table, the pictures to look at, results.json and report.html."""

import json
from pathlib import Path

import torch

from danceopd.config.expressions import texts
from danceopd.config.reading import read_run_config
from danceopd.config.sections import Config
from danceopd.core.fields import Field
from danceopd.core.query import query
from danceopd.core.randomness import step_generator
from danceopd.core.rollout import rollout
from danceopd.core.schedule import sigma_grid
from danceopd.report.page import write_report
from danceopd.support.devices import machine
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.pictures import to_uint8
from danceopd.support.run_log import read_log
from danceopd.support.texts import columns_of
from danceopd.world.detector import detect
from danceopd.world.dit import DiT
from danceopd.world.files import load_model, resolve_weights, shipped_sources
from danceopd.world.sampling import make_conditioning
from danceopd.world.scene import render
from danceopd.world.scores import edit_scores, geneval_correct
from danceopd.world.scoring import as_field, edit_set, make_sampler, score_row, t2i_set
from danceopd.world.teachers import source_fields
from danceopd.world.weight_merge import weight_merge

BAR = 0.95  # of a source's score; a student that reaches it on both has both capabilities

PICTURES = 8


def contestants(config: Config, student: DiT) -> dict[str, Field]:
    """Loads the rows of a run's table in order: base, every source, the merge of the sources, the student.

    The base is what the student began as; of one that began as the merge, what sources that ship were trained from.
    """
    networks = {name: load_model(resolve_weights(source.weights)) for name, source in config.networks().items()}
    start = config.student.init_from
    if start == "merge" and all(source.weights in shipped_sources() for source in config.networks().values()):
        start = "base"
    fields = {} if start == "merge" else {"base": as_field(load_model(resolve_weights(start)))}
    make = source_fields(config, networks)
    for name in config.sources:
        if drawable(config, name):
            fields[f"source_{name}"] = make(name)
    fields["weight_merge"] = as_field(weight_merge(list(networks.values())))
    fields[config.method] = as_field(student)
    return fields


def drawable(config: Config, name: str) -> bool:
    """Whether a source can be asked for the evaluation's pictures, of which a text has nothing but the prompt."""
    return all(column == "prompt" for text in texts(config, name) for column in columns_of(text))


def draw_pictures(fields: dict[str, Field], config: Config, network: DiT) -> dict:
    """Draws the report's pictures: prompts x models, edits x models, and the student's rollouts."""
    sampler, seed = make_sampler(config, network.config), config.evaluation.seed + 17
    prompts, _ = t2i_set(seed, 2)
    prompts = prompts[:PICTURES]
    edits, source, expected = edit_set(seed, 2)
    edits, source, expected = edits[:PICTURES], source[:PICTURES], expected[:PICTURES]
    texts, instructions = [p.text for p in prompts], [e.text for e in edits]
    drawn = {name: sampler(field, texts, None, seed) for name, field in fields.items()}
    edited = {name: sampler(field, instructions, render(source), seed) for name, field in fields.items()}
    return {
        "t2i": {
            "prompts": texts,
            "rows": {name: to_uint8(images) for name, images in drawn.items()},
            "correct": {name: geneval_correct(prompts, detect(x)).tolist() for name, x in drawn.items()},
        },
        "edit": {
            "instructions": instructions,
            "sources": to_uint8(render(source)),
            "rows": {name: to_uint8(images) for name, images in edited.items()},
            "scores": {
                name: edit_scores(edits, source, expected, detect(x))["o"].tolist() for name, x in edited.items()
            },
        },
        "filmstrip": [
            _filmstrip(fields[config.method], config, network, texts[4], None, seed),
            _filmstrip(fields[config.method], config, network, instructions[0], render(source[:1]), seed),
        ],
    }


def _filmstrip(field, config: Config, network: DiT, prompt: str, source, seed: int) -> dict:
    """Rolls out one sample, and notes the state that an update with this seed would query."""
    steps, size = config.rollout.num_inference_steps, network.config.image_size
    generator = step_generator(seed, 0)
    noise = torch.randn(1, 3, size, size, generator=generator)
    conditioning = make_conditioning([prompt], source, network.config.text_length)
    sigmas = sigma_grid(steps, config.rollout.shift)
    states, sigma = rollout(field, noise, conditioning, sigmas, torch.arange(steps + 1)[None], config.rollout.solver)
    return {
        "prompt": prompt,
        "sigmas": sigma[0].tolist(),
        "states": to_uint8(states[0]),
        "queried": int(query(1, steps, generator, bias=config.query.bias)),
        "source": None if source is None else to_uint8(source)[0],
    }


def evaluate_run(folder: Path, progress=lambda items: items) -> dict:
    """Scores every row of a run, and writes its results.json and report.html.

    Args:
        folder: The run's.
        progress: Wraps the list of what is done while it is worked through (tqdm fits).

    Returns:
        The results.

    Raises:
        UserError: The folder holds no run, or no student.
    """
    config = read_run_config(folder)
    if not (folder / "student.safetensors").exists():
        raise UserError(f"{folder} holds no student.safetensors; train first: danceopd train --config ...")
    network = load_model(folder / "student.safetensors")
    fields = contestants(config, network)
    sampler, evaluation = make_sampler(config, network.config), config.evaluation
    rows = [
        score_row(name, field, sampler, evaluation.seed, evaluation.per_task, evaluation.per_kind)
        for name, field in progress(list(fields.items()))
    ]
    log = read_log(folder / "log.jsonl")
    last = log.training[-1] if log.training else {}
    results = {
        "rows": rows,
        "student": config.method,
        "seconds": last.get("seconds"),
        "network_evaluations": last.get("network_evaluations"),
        "machine": machine(),
        "config": config.to_dict(),
        "seed": config.training.seed,
        "bars": {"t2i": BAR, "edit": BAR},
        "warnings": [
            f"source {name} is not scored: it is asked with texts of a manifest's columns"
            for name in config.sources
            if not drawable(config, name)
        ],
    }
    write_atomic(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_report(folder, results, draw_pictures(fields, config, network))
    return results
