"""A model's run as its user watches it: sample grids while it trains, and the report of what came out of it."""

import errno
import itertools
import json
import shutil
from copy import deepcopy

import pytest
import torch
import yaml
from diffusers import Flux2KleinPipeline
from model_runs import teachers_config
from PIL import Image
from safetensors.torch import load_file, save_file

import danceopd.tools.model_report
import danceopd.training.previews
from danceopd.api import distill
from danceopd.cli.parser import main
from danceopd.config.reading import load_config, parse_config
from danceopd.models.backbones import flux2
from danceopd.models.lora_algebra import merge_into
from danceopd.models.lora_files import load_lora
from danceopd.planning.counts import grid_evaluations
from danceopd.planning.dry_run import dry_run
from danceopd.planning.models import examine
from danceopd.report.names import percent
from danceopd.report.tables import format_markdown, format_table
from danceopd.report.words import summary
from danceopd.support.errors import UserError
from danceopd.support.pictures import labelled_grid
from danceopd.tools.model_report import held_out
from danceopd.training.assembly.build import build_model
from danceopd.training.loop import Trainer
from danceopd.training.previews import MODEL_SAMPLES, Previews

SIZE, STEPS, DRAWN, GUIDANCE = 32, 3, 2, 2.0
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def place(prepared_places):
    """A klein, two LoRAs, and prepared rows: the first draws, the second edits."""
    return prepared_places("klein")


def config_of(place, folder, **training):
    """As plain values."""
    training = {
        "device": "cpu",
        "max_steps": 5,
        "batch_size": 2,
        "learning_rate": 5e-2,
        "ema_decay": 0.2,
        "sample_every": 3,
        **training,
    }
    changes = {
        "capabilities.two.task": "edit",
        "capabilities.two.student_guidance_scale": GUIDANCE,
        "rollout.num_inference_steps": STEPS,
        "evaluation.num_inference_steps": DRAWN,
        **{f"training.{key}": value for key, value in training.items()},
    }
    return teachers_config(place, folder, guidance=1.0, **changes).to_dict()


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A finished run, by the command line."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(place, folder / "run")))
    assert main(["train", "--config", str(folder / "config.yaml")]) == 0
    return folder / "run"


def by_hand(transformer, batch, guidance=1.0, empty=None):
    """The Euler trajectory of a plain transformer, in the pipeline's own noise levels."""
    z, levels = batch.noise, flux2.sigmas(batch.model, DRAWN, SIZE, SIZE)
    sources = batch.conditioning.source or ()
    with torch.no_grad():
        for now, then in itertools.pairwise(levels):
            sigma = now.expand(len(z))
            v = flux2.velocity(transformer, z, sigma, batch.conditioning.prompt, sources)
            if guidance != 1:
                uncond = flux2.velocity(transformer, z, sigma, empty, sources)
                v = uncond + guidance * (v - uncond)
            z = z + (then - now) * v
    return z


def test_a_grid_shows_the_student_beside_its_sources(place, tmp_path, monkeypatch):
    seen = []

    def spy(rows, *args, **kwargs):
        seen.append(rows)
        return labelled_grid(rows, *args, **kwargs)

    monkeypatch.setattr(danceopd.training.previews, "labelled_grid", spy)
    trainer = Trainer(*(lambda c: (c, build_model(c)))(parse_config(config_of(place, tmp_path))))
    before, asked = trainer.evaluations.total(), []

    def velocity(transformer, latents, *rest):
        asked.append(len(latents))
        return flux2.velocity(transformer, latents, *rest)

    trainer.parts.student._shared[0]._velocity = velocity
    trainer.previews.write(tmp_path / "grid.png", trainer.engine.ema.module)
    assert trainer.evaluations.total() == before
    assert sum(asked) == sum(grid_evaluations(trainer.config)) == MODEL_SAMPLES * DRAWN * (3 + 2)
    rows = dict(seen[0])
    assert list(rows) == ["one: student", "one: its source one", "two: to edit", "two: student", "two: its source two"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (MODEL_SAMPLES * 96, 5 * (16 + 96))
    base = flux2.load_transformer(place / "model")
    decode = flux2.picture_codec(place / "model")[1]
    for m, name in enumerate(("one", "two")):
        batch = trainer.previews._samples(m)
        batch.model = place / "model"
        teacher = merge_into(deepcopy(base), load_lora(place / name, base, Flux2KleinPipeline))
        expected = decode(by_hand(teacher, batch))
        torch.testing.assert_close(torch.stack(rows[f"{name}: its source {name}"]), expected, atol=2e-3, rtol=0)
        empty = {k: v.expand(MODEL_SAMPLES, *v.shape) for k, v in trainer.parts.empty_prompt.items()}
        untrained = decode(by_hand(base, batch, GUIDANCE if name == "two" else 1.0, empty))
        torch.testing.assert_close(torch.stack(rows[f"{name}: student"]), untrained, atol=2e-3, rtol=0)
        assert (expected - untrained).abs().max() > 0.02
    edited = decode(trainer.previews._samples(1).conditioning.source[0])
    torch.testing.assert_close(torch.stack(rows["two: to edit"]), edited, atol=1e-4, rtol=0)
    # The sources' are drawn once.
    monkeypatch.setattr(trainer.parts, "fields", None)
    trainer.previews.write(tmp_path / "again.png", trainer.engine.ema.module)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_a_run_draws_grids_on_its_way_and_at_its_end(run):
    assert [path.name for path in sorted((run / "samples").iterdir())] == [f"step-{step:08d}.png" for step in (3, 5)]


def test_without_a_vae_it_is_said_at_the_start(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    raw = config_of(place, tmp_path / "run") | {"model": str(tmp_path / "model")}
    message = r"training\.sample_every: sample grids are decoded by the VAE, but no weights"
    with pytest.raises(UserError, match=message):
        build_model(parse_config(raw))
    assert [p for p in dry_run(parse_config(raw), examine).problems if p.startswith("training.sample_every")]
    raw["training"]["sample_every"] = 0
    assert dry_run(parse_config(raw), examine).problems == []


def test_a_grid_that_fails_ends_no_run(place, tmp_path, monkeypatch, capsys):
    def full(self, path, network):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Previews, "write", full)
    folder = distill(parse_config(config_of(place, tmp_path / "run", max_steps=2, sample_every=1)))
    assert "no sample grid: [Errno 28] No space left on device" in capsys.readouterr().err
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "warning" in record] == [1, 2]
    assert (folder / "student" / FILE).is_file()


def test_a_source_with_nan_is_named_before_anything_is_learnt(place, tmp_path):
    tensors = load_file(place / "two" / FILE)
    next(iter(tensors.values()))[0, 0] = float("nan")
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / FILE, {"format": "pt"})
    raw = config_of(place, tmp_path / "run")
    raw["sources"]["two"]["lora"] = [{"path": str(tmp_path / "bad")}]
    with pytest.raises(UserError, match=r"sources\.two\..*not finite"):
        distill(parse_config(raw))
    assert not (tmp_path / "run" / "checkpoints").exists()  # nothing was learnt from it


def test_the_report(run, place, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(danceopd.tools.model_report, "SAMPLES", 3)  # a full micro-batch and the rest
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    assert main(["report", str(moved)]) == 0
    out = capsys.readouterr().out
    assert str(moved / "report.html") in out
    results = json.loads((moved / "results.json").read_text())
    assert results["step"] == 5
    assert results["network_evaluations"] > 0
    assert set(results["velocity_errors"]) == {"one", "two"}
    for name, gap in results["velocity_errors"].items():
        assert gap["source"] == name
        assert gap["after"] < gap["before"]
        assert gap["closed"] == pytest.approx(1 - gap["after"] / gap["before"])
        assert percent(gap["closed"]) in out
        assert len(gap["by_sigma"]["after"]) == STEPS
        assert sum(gap["by_sigma"]["after"]) / STEPS == pytest.approx(gap["after"], rel=1e-4)
    check_the_error_before(results["velocity_errors"]["one"], load_config(moved / "config.yaml"), place)
    page = (moved / "report.html").read_text()
    assert "data:image/jpeg;base64" in page
    assert all(percent(gap["closed"]) in page for gap in results["velocity_errors"].values())
    assert "<svg" in page
    card = moved.parent / "card"
    assert main(["export", str(moved), "-o", str(card)]) == 0
    (line,) = (x for x in (card / "README.md").read_text().splitlines() if x.startswith("| one | one |"))
    assert line.endswith(f"| {percent(results['velocity_errors']['one']['closed'])} |")


def check_the_error_before(gap, config, place):
    """It is the base's own, worked out with plain transformers."""
    batch = held_out(config, build_model(config), 0)
    base = flux2.load_transformer(place / "model")
    teacher = merge_into(deepcopy(base), load_lora(place / "one", base, Flux2KleinPipeline))
    levels, z, errors = flux2.sigmas(place / "model", STEPS, SIZE, SIZE), batch.noise, []
    with torch.no_grad():
        for now, then in itertools.pairwise(levels):
            v, wanted = (flux2.velocity(t, z, now.expand(len(z)), batch.conditioning.prompt) for t in (base, teacher))
            errors.append(float((v - wanted).square().mean()))
            z = z + (then - now) * v
    assert gap["by_sigma"]["before"] == pytest.approx(errors, rel=1e-3)
    assert gap["before"] == pytest.approx(sum(errors) / STEPS, rel=1e-3)


def test_without_the_model_the_page_says_what_it_lacks(run, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    raw = yaml.safe_load((moved / "config.yaml").read_text())
    (moved / "config.yaml").write_text(yaml.safe_dump(raw | {"model": str(tmp_path / "gone")}))
    assert main(["report", str(moved)]) == 0
    printed = capsys.readouterr()
    assert "warning: velocity errors were not measured" in printed.err
    assert "nothing was measured" in printed.out
    page = (moved / "report.html").read_text()
    assert "velocity errors were not measured" in page
    assert "Error closed" not in page
    assert "data:image/jpeg;base64" in page
    assert json.loads((moved / "results.json").read_text())["velocity_errors"] == {}


def test_a_student_that_began_as_its_source():
    kept = {"source": "base", "samples": 8, "before": 0.0, "after": 0.01, "standard_error": 0.001, "closed": None}
    style = kept | {"source": "s", "before": 0.5, "closed": 0.98}
    results = {
        "rows": [],
        "velocity_errors": {"keep": kept | {"relative": 0.034}, "style|x": style | {"relative": 0.02}},
    }
    assert format_table(results).splitlines()[2].split()[-1] == "–"
    assert "| style\\|x | s | 0.5 | 0.01 ± 0.001 | 2 % | 98.0 % |" in format_markdown(results)
    for figure in ("98.0 %", "3.4 %"):
        assert figure in summary(results)
