"""configs/: every file parses and passes the dry run on a tiny model of its family, and fits its card at real size."""

import re
from dataclasses import replace
from pathlib import Path

import make_memory as memory_page
import pytest
from real_models import CONFIGS, MADE, finish, model_of, overrides, real_place
from released import MODELS

from danceopd.api import examiner_of
from danceopd.config.reading import load_config
from danceopd.data.prepare import prepare
from danceopd.miniature.data import write_miniature
from danceopd.miniature.shipped import PIPELINE
from danceopd.models.swapping import swapped_of
from danceopd.planning.cluster import plan
from danceopd.planning.dry_run import dry_run
from danceopd.planning.memory import LEFT
from danceopd.planning.models import examine
from danceopd.planning.swapping import settle
from danceopd.support import cards
from danceopd.support.memory import GIB

# What one card holds: 24 and 80 GB by their names, less what the estimate leaves out.
CARDS = {True: 24 - 2, False: 79 - 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def place(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            MADE[family](root / "model")
            finish(root, family, size=64, rank=2, length=24)
            made[family] = root
        return made[family]

    return place


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The model's folder at its real size."""
    made = {}

    def place(model):
        if model not in made:
            made[model] = real_place(tmp_path_factory.mktemp("real"), model)
        return made[model]

    return place


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_configuration_passes_the_dry_run(tiny, config):
    root = tiny(MODELS[model_of(config)][0])
    plan = dry_run(load_config(config, overrides(config, root)), examine)
    libraries = ("training.optimizer: adamw_8bit needs", "training.base_precision: int8 needs")
    assert [problem for problem in plan.problems if not problem.startswith(libraries)] == []
    assert plan.activations
    assert plan.evaluations


@pytest.mark.parametrize("config", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_other_configuration_passes_it_too(config, tmp_path):
    changes = [f"training.output_dir={tmp_path}"]
    if config.stem.startswith("miniature"):  # examples/journey.py writes their data
        manifest, rows = write_miniature(tmp_path / "data", ["t2i", "edit", "edit-half"], 4, 0), tmp_path / "cache"
        prepare(manifest, PIPELINE, rows, resolution=64, max_sequence_length=16)
        changes += [
            f"capabilities.{name}.data.prepared={rows / 'manifest.jsonl'}" for name in load_config(config).capabilities
        ]
    if config.stem == "miniature_unseen":  # its source takes an hour of training
        changes += ["sources.edit.lora=[{path: miniature/edit}]"]
    if config.stem == "setting_f":  # its student is another run's
        changes += ["student.init_from=t2i", "sources.self.weights=t2i"]
    loaded = load_config(config, changes)
    assert dry_run(loaded, examiner_of(loaded)).problems == []


DOCS = Path(__file__).parents[2] / "docs"
MODELS_PAGE = (DOCS / "models.md").read_text(encoding="utf-8")

# Where there is a file for 24 GB too, the one for 80 GB is the slower tests'; and so is the newer of two models that
# are alike but for their weights.
AT_REAL_SIZE = [
    pytest.param(path, marks=pytest.mark.slow)
    if path.with_stem(path.stem + "-24gb").exists() or path.stem == "qwen-image-2512-c"
    else path
    for path in memory_page.configurations()
]


def test_models_of_one_size_have_one_line():
    lines = [line.strip("| ").split(" | ") for line in MODELS_PAGE.splitlines() if line.startswith("| `qwen-image")]
    rows = {cells[0].strip("`"): cells[1:] for cells in lines}
    assert MODELS["qwen-image-2512"] == MODELS["qwen-image"]
    assert rows["qwen-image-2512-c"] == rows["qwen-image-c"]


@pytest.mark.parametrize("config", AT_REAL_SIZE, ids=lambda path: path.stem)
def test_it_fits_its_card_at_the_real_size(real, config):
    model = model_of(config)
    loaded = memory_page.loaded(config, real(model))
    if loaded.training.base_precision:
        pytest.importorskip("torchao")
    plan = dry_run(loaded, examine)
    if said := re.search(r"One rank takes (\d+) GiB", config.read_text()):
        assert int(said[1]) == round(plan.total_memory() / GIB)
    assert bool(said) == (loaded.student.lora is None)
    assert plan.parameters["base"] == pytest.approx(MODELS[model][2] * 1e9, rel=0.03)
    assert plan.total_memory() < CARDS["24gb" in config.stem] * GIB
    assert memory_page.row(config, plan) in MODELS_PAGE, "make docs writes docs/models.md again"
    assert plan.activations[0] > 2 * plan.activations[1]


@pytest.mark.parametrize(("config", "card"), [("qwen-image-c", "rtx-4090"), ("flux.1-dev-c", "rtx-4080")])
def test_with_blocks_that_wait_in_host_memory_it_fits_a_small_card(real, config, card):
    path = CONFIGS / f"{config}.yaml"
    root = real(model_of(path))
    changes = [*overrides(path, root), "training.batch_size=4", "training.gradient_accumulation_steps=4"]
    loaded = load_config(path, [*changes, "training.swap_blocks=auto"])
    planned = plan(loaded, examine, 1, card)
    found, room = planned.findings, cards.CARDS[card].memory - LEFT
    whole = replace(found, memory=dict(found.memory), host=dict(found.host))
    settle(loaded, whole, 1000 * GIB)
    assert whole.swap is None
    assert whole.total_memory() > room
    own = planned.estimate(planned.own_setting(0))
    assert own.bytes() == pytest.approx(found.total_memory())
    assert found.total_memory() <= room
    sizes = [found.blocks[i] for i in swapped_of(len(found.blocks), found.swap.count, "it")]
    assert found.swap.size == sum(sizes) == found.host["blocks of the base"][0]
    assert whole.memory["base weights"][0] - found.memory["base weights"][0] == sum(sorted(sizes)[:-2])
    # 16 steps, the sources, and four micro-batches forward and again, on a bus of 25 and 50 GB/s.
    assert found.swap.passes == 16 + 1 + 2 * 4
    sent = found.swap.size * 25
    assert f"{sent / 25e9:.3g} s at 25 GB/s, or {sent / 50e9:.3g} s at 50 GB/s".replace(", or", " or") in planned.text()
    assert "PCIe 32 GB/s a card in a machine" in planned.text()  # neither card has NVLink
    fewer = replace(found, memory=dict(found.memory), host=dict(found.host))
    settle(load_config(path, [*changes, f"training.swap_blocks={found.swap.count - 1}"]), fewer, None)
    assert fewer.total_memory() > room  # auto takes no more than have to wait


PAPER = Path("configs/paper")


@pytest.mark.parametrize("config", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_published_setting_passes_the_dry_run_and_trains_what_theirs_does(tiny, config):
    root = tiny("sd3" if "add_q_proj" in load_config(config).student.lora.targets else "z_omni")
    changes = overrides(config, root)
    if config.stem == "sd3.5-c":
        changes.append(f"sources.realism.weights={root / 'model'}")
    for name, capability in load_config(config).capabilities.items():
        kind = KINDS[name] if capability.task == "edit" or name == "realism" else "t2i"
        changes.append(f"capabilities.{name}.capability={kind}")
    loaded = load_config(config, changes)
    plan = dry_run(loaded, examine)
    assert plan.problems == []
    lora, training = loaded.student.lora, loaded.training
    assert (lora.rank, lora.alpha, lora.init) == (128, 128, "gaussian")
    assert (training.learning_rate, training.max_steps) == (2e-4, 3000)
    assert (training.optimizer, training.weight_decay, training.max_grad_norm, training.ema_decay) == ("adamw", 0, 1, 0)
    assert loaded.rollout.num_inference_steps == 16
    if loaded.method == "danceopd":
        assert (loaded.route, loaded.query.k, loaded.query.bias) == ("per_update", 1, "low_t")
    else:
        assert loaded.route == "round_robin"  # all capabilities in each update
    group = loaded.method_options().get("group_size", 1)
    assert training.batch_size // training.gradient_accumulation_steps == 8 * group  # one at a time on each of 8 cards
    asked = {"danceopd": 4, "diffusion_opd": 4 * 2, "flow_opd": 16 // 8 * 2}  # by each card for an update
    assert training.batch_size == 8 * asked[loaded.method]


# Of the rows that `write_rows` writes, for the names that the authors give.
KINDS = {"t2i": "t2i", "edit": "edit", "local_edit": "local", "global_edit": "global", "realism": "style"}
