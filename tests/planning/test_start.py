"""For every configuration that passes the dry run, the start of training raises nothing: drawn ones, on drawn files."""

import copy
import json
import random
import shutil
import struct

import pytest
import torch
from model_runs import config_of
from safetensors.torch import load_file, save_file
from world_runs import raw_run, write_networks

from danceopd.api import builder_of, examiner_of
from danceopd.config.reading import parse_config
from danceopd.core.methods import METHODS
from danceopd.planning.dry_run import dry_run, with_memory_chosen
from danceopd.support.errors import UserError
from danceopd.training.loop import train

# What is drawn of a configuration, by its key with dots: the plain value, and others.
ANY = {
    "method": list(METHODS),
    "route": ["random", "round_robin", "by_error", "one"],
    "query.bias": ["low_t", "high_t", "uniform"],
    "query.k": [1, 2, 4, 9],
    "rollout.num_inference_steps": [4, 1, 2, 3],
    "rollout.solver": ["euler", "heun", "ab2"],
    "rollout.shift": [5.0, 1.0],
    "capabilities.one.weight": [1.0, 0.0, 3.0],
    "capabilities.one.prompt_dropout": [0.0, 0.5],
    "capabilities.one.student_guidance_scale": [1.0, 2.0],
    "capabilities.two.task": ["t2i", "edit"],
    "capabilities.two.source": ["two", "one", "three"],
    "sources.two.guidance_scale": [1.0, 3.0, 0.0],
    "sources.three": [{"mean": ["one", "two"]}, {"difference": {"base": "one", "source": "two", "weight": 2.0}},
                      {"guided": {"source": "one", "scale": 3.0}},
                      {"by_sigma": {"above": "one", "below": "two", "sigma": 0.5}},
                      {"autoguided": {"source": "one", "weak": "two", "scale": 2.0}},
                      {"compose": {"base": "one", "sources": {"two": 1.0}}},
                      {"guided": {"source": "two", "scale": 2.0, "skip_layers": {"layers": [0], "scale": 1.0}}},
                      {"guided": {"source": "two", "scale": 2.0, "skip_layers": {"layers": [7], "scale": 1.0}}},
                      {"slider": {"source": "one", "positive": "a cup", "negative": "a dog", "eta": 1.0}},
                      {"teacher_at": {"source": "two", "prompt": "{prompt} again"}},
                      {"guided": {"source": "one", "scale": 2.0, "negative": "blurred"}}],
    "training.batch_size": [4, 1, 2, 6],
    "training.gradient_accumulation_steps": [1, 2, 5],
    "training.rollout_batch_size": ["auto", 1, 3, 100],
    "training.optimizer": ["adamw", "muon", "adamw_8bit"],
    "training.precision": ["fp32", "bf16"],
    "training.rollout_precision": [None, "bf16", "fp8"],
    "training.base_precision": [None, "fp8", "nf4", "int8", "auto"],
    "training.gradient_checkpointing": [False, True],
    "training.offload_sources": [False, True],
    "training.swap_blocks": [None, 1, "auto", 9],
    "training.cuda_graphs": ["auto", True],
    "training.warmup_steps": [0, 50],
    "training.lr_schedule": ["constant", "cosine"],
    "training.sample_every": [0, 1],
    "training.attention_backend": ["auto", "native", "flash"],
    "training.trackers": [[], ["trackio"]],
    "training.max_network_evaluations": [None, 1, 50],
}  # fmt: skip
WORLD = {
    "student.init_from": ["base", "merge", "one"],
    "sources.one.weights": ["plain", "gone", "damaged", "wider", "headless", "nan"],
    "evaluation.times": [0, 1],
}
MODEL = {
    "student.init_from": ["base", "merge", "one", "four"],
    "student.lora": [{"rank": 4}, None, {"rank": 2, "targets": "all-linear"},
                     {"rank": 2, "targets": ["to_q", "nothing"]},
                     {"rank": 500}, {"rank": 3, "rank_pattern": {"to_k": 1}, "alpha": 2.0, "init": "gaussian"}],
    "student.embedded_guidance": [None, 3.5],
    "sources.one.lora": ["plain", "gone", "damaged", "wider", "headless", "other layers", "cut", "nan"],
    "sources.four": [None, {"weights": "base"}, {"weights": "other"}, {"weights": "one file"}],
    "capabilities.one.capability": ["one", "two", "none of these"],
    "capabilities.one.data.prepared": ["plain", "gone", "damaged", "of other sizes"],
}  # fmt: skip


def put(raw, key, value):
    """Puts a value under a key with dots; None where there is no such key leaves it out."""
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
    if value is None:
        raw.pop(last, None)
    else:
        raw[last] = value


def damaged(path, kind, target):
    """Writes a file of tensors that is damaged, or fits something else; returns its path."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if kind == "damaged":
        data = data[: len(data) - 40]
    elif kind == "headless":
        data = struct.pack("<Q", 2**40) + data[8:]
    else:
        tensors = load_file(path)
        if kind == "wider":
            tensors = {name: torch.cat([t, t], -1) if t.dim() else t for name, t in tensors.items()}
        elif kind == "nan":
            tensors = {name: t * float("nan") if t.is_floating_point() else t for name, t in tensors.items()}
        elif kind == "cut":
            tensors = dict(list(tensors.items())[:-1])
        elif kind == "other layers":
            tensors = {name.replace("blocks", "blocks_of_another"): t for name, t in tensors.items()}
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
        save_file(tensors, target, metadata)
        return str(target)
    target.write_bytes(data)
    return str(target)


def drawn(seed, raw, choices):
    """Changes some keys, more often few than many; the first choice of each is what it was."""
    dice, raw = random.Random(seed), copy.deepcopy(raw)
    for key in dice.sample(sorted(choices), dice.choice((1, 2, 3, 3, 4, 6))):
        put(raw, key, copy.deepcopy(dice.choice(choices[key])))
    used = {c["source"] for c in raw["capabilities"].values()}
    for name in ("three", "four"):
        if name in used | {raw["student"].get("init_from")} and name not in raw["sources"]:
            put(raw, f"sources.{name}", {"mean": ["one", "two"]} if name == "three" else {"weights": "base"})
        elif name in raw["sources"] and name not in used:
            put(raw, "capabilities.two.source", name)
    return raw


def starts(raw):
    """What came of a configuration: refused as it is read, or by the dry run; else it trains one update."""
    try:
        config = parse_config(raw)
        if dry_run(config, examiner_of(config)).problems:
            return "dry run"
    except UserError:
        return "refused"
    train(with_memory_chosen(config, examiner_of(config)), builder_of(config))
    return "started"


def outcomes(make, seeds):
    """Counts them; a configuration that does not start is shown."""
    found = {"refused": 0, "dry run": 0, "started": 0}
    for seed in seeds:
        raw = make(seed)
        try:
            found[starts(raw)] += 1
        except (Exception, SystemExit) as error:
            raise AssertionError(f"seed {seed} passes the dry run and does not start: {raw}") from error
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_networks(folder)
    raw = raw_run(folder)
    raw["training"] |= {"max_steps": 1, "batch_size": 4, "sample_every": 0}
    raw["capabilities"] = dict(zip(("one", "two"), raw["capabilities"].values(), strict=True))
    raw["evaluation"] = {"times": 0, "quick": 1, "num_inference_steps": 1, "per_task": 1, "per_kind": 1}

    def make(seed):
        made = drawn(seed, raw, ANY | WORLD)
        kind = made["sources"]["one"]["weights"]
        if kind in WORLD["sources.one.weights"]:
            path = folder / f"{kind}-one.safetensors"
            there = kind in ("plain", "gone")
            plain = str(folder / "one.safetensors") if kind == "plain" else str(path)
            made["sources"]["one"]["weights"] = plain if there else damaged(folder / "one.safetensors", kind, path)
        made["training"]["output_dir"] = str(folder / f"run-{seed}")
        return made

    return make


@pytest.fixture(scope="module")
def model(places, tmp_path_factory):
    place, folder = places("sd3"), tmp_path_factory.mktemp("model")
    raw = config_of(place).to_dict()
    raw["training"] |= {"max_steps": 1}
    shutil.copytree(place / "cache", folder / "sizes")
    rows = (folder / "sizes" / "rows.jsonl").read_text().replace("[64, 64]", "[64, 80]")
    (folder / "sizes" / "rows.jsonl").write_text(rows)
    (folder / "damaged.jsonl").write_text((place / "cache" / "rows.jsonl").read_text()[:-30])

    def make(seed):
        made, path = drawn(seed, raw, ANY | MODEL), folder / f"one-{seed}.safetensors"
        made["rollout"].pop("shift", None)
        kind = made["sources"]["one"]["lora"]
        if isinstance(kind, str):
            plain = str(place / "one.safetensors") if kind == "plain" else str(folder / "gone.safetensors")
            file = plain if kind in ("plain", "gone") else damaged(place / "one.safetensors", kind, path)
            made["sources"]["one"]["lora"] = [{"path": file}]
        own = made["sources"].get("four", {}).get("weights")
        if own in ("other", "one file"):
            made["sources"]["four"]["weights"] = str(place / ("other" if own == "other" else "other.safetensors"))
        data = made["capabilities"]["one"]["data"]
        rows = {"plain": place / "cache" / "rows.jsonl", "gone": folder / "gone.jsonl",
                "damaged": folder / "damaged.jsonl", "of other sizes": folder / "sizes" / "rows.jsonl"}  # fmt: skip
        data["prepared"] = str(rows.get(data["prepared"], data["prepared"]))
        made["training"]["output_dir"] = str(folder / f"run-{seed}")
        return made

    return make


def test_runs_of_the_picture_world(world):
    assert outcomes(world, range(24))["started"] > 4


def test_runs_of_a_model(model):
    assert outcomes(model, range(16))["started"] > 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_runs(world, model):
    for make in (world, model):
        found = outcomes(make, range(100, 500))
        print(found)
        assert min(found.values()) > 20
