"""The training loop: converges, resumes bit for bit, survives kills, full disks and numbers that are not finite."""

import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
import yaml
from danceopd_kernels import compiled
from PIL import Image
from safetensors.torch import load_file
from world_runs import TINY, config_of, random_network, write_networks

from danceopd.api import distill
from danceopd.config.reading import parse_config
from danceopd.core.questions import matched
from danceopd.core.schedule import sigma_grid
from danceopd.core.watch import columns, watched
from danceopd.data.sampler import draw_batch
from danceopd.support.errors import UserError
from danceopd.training import checkpoints as state
from danceopd.training import loop
from danceopd.training.health import Health
from danceopd.training.loop import Trainer
from danceopd.training.resume import go_on
from danceopd.world.build import build
from danceopd.world.data import WorldData, write_world
from danceopd.world.files import load_model, save_model
from danceopd.world.sampling import embedded_samples


def tensors(value, prefix=""):
    """Every tensor and number of a nested state by its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{prefix}/{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors(item, f"{prefix}/{i}")
    else:
        yield prefix, value


def assert_same_state(a, b):
    a, b = dict(tensors(a)), dict(tensors(b))
    a.pop("/seconds")
    b.pop("/seconds")
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def newest(folder):
    checkpoint = state.load_newest(folder / "checkpoints")[0]
    whole = {name: checkpoint.tensor(name) for name in checkpoint.shapes}
    student = {name.removeprefix("student/"): value for name, value in whole.items() if name.startswith("student/")}
    return {**checkpoint.rest, **whole, "student": student}


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# What of a record is another each time.
TIMED = ("seconds", "samples_per_second", "tokens_per_second", "peak_memory_gib", "phases")


def test_a_run_writes_what_it_promises(raw, tmp_path):
    folder = distill(config_of(raw))
    log = records(folder)
    losses = [r for r in log if "loss" in r]
    assert [r["step"] for r in losses] == [1, 2, 3, 4, 5, 6]
    assert set(losses[-1]["loss_by_capability"]) <= {"t2i", "edit"}
    assert [r["step"] for r in log if "evaluation" in r] == [0, 3, 6]
    assert (folder / "samples" / "step-00000004.png").exists()
    assert list((folder / "tensorboard").iterdir())
    assert [p.name for p in state.checkpoints(folder / "checkpoints")] == [
        "step-00000004",
        "step-00000006",
    ]
    assert load_model(folder / "student.safetensors").config == TINY
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["max_steps"] == 6
    # Evaluations: every rollout step, one of the source, three of the student, for each sample.
    assert losses[0]["network_evaluations"] >= 8 * 4
    assert losses[0]["network_evaluations"] <= 8 * (3 + 4)
    assert all(0.01 < r["peak_memory_gib"] < 1000 for r in losses)
    asked = [r["health"]["queries"] for r in log if "health" in r]
    assert [sum(counts.values()) for counts in asked] == [
        2 * 8,
        4 * 8,
        6 * 8,
    ]  # one of each sample, of the whole run so far
    assert set(asked[-1]) <= {f"{sigma:.3f}" for sigma in sigma_grid(4, 5.0)[:-1].tolist()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_equals_uninterrupted(raw, tmp_path, optimizer):
    raw["training"]["optimizer"] = optimizer
    whole = distill(config_of(raw, output_dir=str(tmp_path / "whole"), lr_schedule="cosine"))
    half = config_of(raw, lr_schedule="cosine")

    class Stop(Exception):
        pass

    trainer = Trainer(half, build(half))
    update = trainer.update

    def stop_at_three():
        if trainer.step == 3:
            raise Stop
        return update()

    trainer.update = stop_at_three
    with pytest.raises(Stop):
        trainer.run()
    folder = distill(half)
    assert_same_state(newest(whole), newest(folder))
    assert [r["step"] for r in records(folder) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    strip = [{k: v for k, v in r.items() if k not in TIMED} for r in records(whole)]
    again = [{k: v for k, v in r.items() if k not in TIMED} for r in records(folder)]
    assert [r for r in strip if "loss" in r] == [r for r in again if "loss" in r]


def test_killed_process_goes_on_bit_for_bit(raw, tmp_path):
    raw["training"].update(max_steps=40, sample_every=0)
    raw["evaluation"]["times"] = 0
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = tmp_path / "whole"

    def start(folder):
        command = [sys.executable, "-m", "danceopd", "train", "--config", str(path)]
        command.append(f"training.output_dir={folder}")
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    folders = {sig: tmp_path / sig.name for sig in (signal.SIGKILL, signal.SIGINT)}
    uninterrupted, killed_at, again = start(whole), {}, {}
    for sig, folder in folders.items():
        process, deadline = start(folder), time.monotonic() + 600
        while not state.checkpoints(folder / "checkpoints"):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(sig)
        process.communicate(timeout=600)
        assert process.returncode == (130 if sig == signal.SIGINT else -signal.SIGKILL)
        killed_at[sig] = newest(folder)["step"]
        assert 2 <= killed_at[sig] < 40
        again[sig] = start(folder)
    uninterrupted.communicate(timeout=600)
    for sig, process in again.items():
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert f"going on from step {killed_at[sig]}" in out
        assert_same_state(newest(whole), newest(folders[sig]))


def test_micro_batches_do_not_change_the_update(raw, tmp_path):
    one = newest(distill(config_of(raw, output_dir=str(tmp_path / "one"))))
    four = newest(distill(config_of(raw, output_dir=str(tmp_path / "four"), gradient_accumulation_steps=4)))
    for key, value in one["student"].items():
        torch.testing.assert_close(four["student"][key], value, atol=2e-5, rtol=2e-4)


def test_a_run_with_the_kernels_is_one_without(raw, tmp_path, monkeypatch):
    module = sys.modules["danceopd_kernels.routed_velocity_mse"]  # the package has a function of that name
    original, used = module.choose, Counter()

    def counted(*args):
        backend = original(*args)
        used[backend] += 1
        return backend

    monkeypatch.setattr(module, "choose", counted)
    states = []
    for backend in ("", "torch"):
        monkeypatch.setenv("DANCEOPD_KERNELS", backend)
        states.append(distill(config_of(raw, output_dir=str(tmp_path / f"run{backend}"))))
    assert used == ({"cpu": 6, "torch": 6} if compiled.module("cpu") else {"torch": 12})
    for a, b in zip(*map(records, states), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    one, other = (newest(folder)["student"] for folder in states)
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], atol=2e-5, rtol=2e-4)


def test_student_of_one_teacher_converges_to_it(raw):
    raw["sources"].pop("two")
    raw["capabilities"]["edit"]["source"] = "one"
    config = config_of(raw, max_steps=100, batch_size=16, learning_rate=3e-3, sample_every=0, ema_decay=0.5)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"times": 0})})
    losses = [r["loss"] for r in records(distill(config)) if "loss" in r]
    assert sum(losses[-10:]) < 0.25 * sum(losses[:3]) * 10 / 3


def test_another_configuration_is_refused_and_overwrite_starts_again(raw):
    distill(config_of(raw))
    changed = config_of(raw, ema_decay=0.7)
    with pytest.raises(UserError, match=r"another configuration \(training\.ema_decay\).*may change: .*learning_rate"):
        distill(changed)
    folder = distill(changed, overwrite=True)
    assert newest(folder)["step"] == 6
    assert [r["step"] for r in records(folder) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_a_version_with_fewer_keys_goes_on(raw):
    config = config_of(raw)
    trainer = Trainer(config, build(config))
    trainer.save()
    saved, _ = state.load_newest(config.training.output_dir / "checkpoints")
    identity = saved.rest["identity"]
    del identity["model"], identity["student"]["lora"], identity["sources"]["one"]["lora"]
    go_on(trainer, saved)
    identity["student"]["lora"] = {"rank": 4}
    with pytest.raises(UserError, match=r"student\.lora"):
        go_on(trainer, saved)


def spoil(path, how):
    """A file with one bit flipped in the middle, cut to a half, or gone."""
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


def test_how_fast_it_learns_may_change_when_it_goes_on(raw, capsys):
    distill(config_of(raw))
    folder = distill(config_of(raw, max_steps=8, learning_rate=1e-5, lr_schedule="cosine", weight_decay=0.1))
    assert "going on from step 6" in capsys.readouterr().out
    rates = [r["learning_rate"] for r in records(folder) if "learning_rate" in r]
    assert rates[-1] <= 1e-5 < rates[0]


def test_a_run_goes_on_by_what_its_files_hold_wherever_they_lie(raw, capsys, tmp_path):
    place = tmp_path / "place"
    rows = write_world(place / "data", ["t2i"], 4, 0)
    write_networks(place)

    def config(place, steps):
        for name in ("one", "two"):
            raw["sources"][name]["weights"] = str(place / f"{name}.safetensors")
        raw["student"] = {"init_from": str(place / "base.safetensors")}
        raw["capabilities"]["t2i"]["data"] = {"manifest": str(place / "data" / rows.name)}
        return config_of(raw, max_steps=steps, sample_every=0)

    distill(config(place, 2))
    elsewhere = place.rename(tmp_path / "elsewhere")
    distill(config(elsewhere, 4))
    assert "going on from step 2" in capsys.readouterr().out
    picture = next((elsewhere / "data").rglob("*.png"))
    changes = {
        "sources.one.weights": (elsewhere / "one.safetensors", (elsewhere / "two.safetensors").read_bytes()),
        "student.init_from": (elsewhere / "base.safetensors", (elsewhere / "two.safetensors").read_bytes()),
        "capabilities.t2i.data.manifest": (picture, _other_picture(picture)),
    }
    for key, (file, content) in changes.items():
        before = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{key} \(.*elsewhere.*\) has another content;"):
            distill(config(elsewhere, 6))
        file.write_bytes(before)
    distill(config(elsewhere, 6))
    assert "going on from step 4" in capsys.readouterr().out


def _other_picture(path):
    with Image.open(path) as picture:
        data = io.BytesIO()
        picture.rotate(180).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("behind", ["checkpoints", "student"])
def test_a_run_that_was_killed_at_its_end_writes_what_is_missing(raw, capsys, behind):
    config = config_of(raw, keep_checkpoints=1, sample_every=0)
    folder = distill(config)
    student, expected = folder / "student.safetensors", load_file(folder / "student.safetensors")
    (name,) = state.checkpoints(folder / "checkpoints")
    if behind == "student":  # the one of an earlier step, or none
        student.unlink()
    else:
        save_model(random_network(9), student)
        shutil.copytree(name, name.with_name("step-00000002"))
    for left in (folder / ".student.safetensors.123.tmp", folder / ".config.yaml.4.tmp"):
        left.write_bytes(b"x")
    (folder / "checkpoints" / ".step-00000006.tmp").mkdir()
    log = (folder / "log.jsonl").read_bytes()
    capsys.readouterr()
    distill(config)
    said = capsys.readouterr()
    assert f"{folder} is finished after 6 updates: nothing is left to train" in said.out
    assert "going on" not in said.out
    assert "step" not in said.err  # no bar of nothing
    assert (folder / "log.jsonl").read_bytes() == log
    assert [*map(str, state.checkpoints(folder / "checkpoints"))] == [str(name)]
    assert [path.name for path in folder.rglob(".*")] == []
    found = load_file(student)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_run_that_was_killed_before_its_first_checkpoint_leaves_nothing_behind(raw):
    config = config_of(raw, max_steps=1, sample_every=0)
    folder = config.training.output_dir
    for left in (folder / ".log.jsonl.123.tmp", folder / "samples" / ".step.png.4.tmp"):
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"x")
    distill(config)
    assert [path.name for path in folder.rglob(".*")] == []


def test_a_damaged_checkpoint_keeps_no_whole_one_from_being_kept(raw):
    folder = distill(config_of(raw, keep_checkpoints=2, sample_every=0))
    last = state.checkpoints(folder / "checkpoints")[-1]
    spoil(last / "rest.pt", "flipped")
    distill(config_of(raw, keep_checkpoints=1, save_every=1, max_steps=5, sample_every=0))
    assert [path.name for path in state.checkpoints(folder / "checkpoints")] == ["step-00000005"]
    assert state.load_newest(folder / "checkpoints")[0].step == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m | {"files": {}},
        lambda m: m | {"step": 3},
        lambda m: {key: value for key, value in m.items() if key != "shapes"},
        lambda m: {key: value for key, value in m.items() if key != "blake2b"},
        lambda m: m | {"shapes": {**m["shapes"], "new": [1]}},
        lambda m: [m],
        lambda m: None,
    ],
)
def test_a_manifest_that_is_not_as_it_was_written_is_a_damaged_checkpoint(tmp_path, change):
    for step in (1, 2):
        state.save_state(tmp_path, step, {"a": torch.ones(4)}, {"a": torch.Size([2, 2])}, {"step": step}, keep=2)
    manifest = state.checkpoints(tmp_path)[-1] / "manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    found, messages = state.load_newest(tmp_path)
    assert (found.step, len(messages)) == (1, 1)
    assert f"{manifest.parent} is damaged" in messages[0]


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("name", ["rank-00000-of-00001.safetensors", "rest.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(raw, capsys, name, how):
    folder = distill(config_of(raw, sample_every=0))
    last = state.checkpoints(folder / "checkpoints")[-1]
    spoil(last / name, how)
    distill(config_of(raw, max_steps=7, sample_every=0))
    out = capsys.readouterr().out
    assert (f"{last} is damaged" in out) == ((name, how) != ("manifest.json", "gone"))  # then it was never whole
    assert "going on from step 4" in out


def test_no_checkpoint_that_is_whole(raw):
    folder = distill(config_of(raw))
    for path in state.checkpoints(folder / "checkpoints"):
        spoil(path / "rest.pt", "cut")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        distill(config_of(raw, max_steps=8))


def test_full_disk_keeps_the_previous_checkpoint(raw, monkeypatch):
    folder = distill(config_of(raw))
    before = newest(folder)

    real = os.replace

    def full(source, target):
        if "step-" in str(target):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"No space left on device.*step-00000006 is still good"):
        distill(config_of(raw, max_steps=8))
    monkeypatch.undo()
    assert_same_state(before, newest(folder))
    assert not list((folder / "checkpoints").glob(".*tmp"))


def test_a_disk_that_fills_up_while_torch_writes(tmp_path, monkeypatch):
    """Its writer's own error hides the system's."""
    tensors = {"a": torch.zeros(10)}, {"a": torch.Size([10])}
    state.save_state(tmp_path, 1, *tensors, {"b": 1}, 2)

    def full(*_):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"No space left on device; the checkpoint .*step-00000001 is still good"):
        state.save_state(tmp_path, 2, *tensors, {}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_unwritable_folder_is_found_before_training(raw, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UserError, match=r"training\.output_dir: cannot write"):
        distill(config_of(raw, output_dir=str(blocker / "run")))


def test_everything_missing_is_listed_at_once(raw, tmp_path):
    raw["student"]["init_from"] = "bse"
    raw["sources"]["one"]["weights"] = str(tmp_path / "nowhere.safetensors")
    raw["capabilities"]["t2i"]["data"] = {"manifest": str(tmp_path / "none.jsonl")}
    with pytest.raises(UserError) as error:
        distill(config_of(raw))
    for key in ("student.init_from", "sources.one.weights", "capabilities.t2i.data"):
        assert key in str(error.value)


def test_edit_route_without_sources_is_an_error(raw, tmp_path):
    manifest = write_world(tmp_path / "data", ["t2i"], 4, 0)
    raw["capabilities"]["edit"] = {
        "source": "two",
        "task": "edit",
        "capability": "t2i",
        "data": {"manifest": str(manifest)},
    }
    with pytest.raises(UserError, match=r"capabilities\.edit\.data: task is edit, but no row"):
        build(config_of(raw))


def test_a_manifest_trains_as_the_world_does(raw, tmp_path):
    manifest = write_world(tmp_path / "data", ["t2i", "edit"], 50, 1)
    world = newest(distill(config_of(raw, output_dir=str(tmp_path / "world"), max_steps=3)))
    for name in ("t2i", "edit"):
        raw["capabilities"][name]["data"] = {"manifest": str(manifest)}
    mine = newest(distill(config_of(raw, max_steps=3)))
    for key, value in world["student"].items():  # pictures on disk are rounded to 8 bits
        torch.testing.assert_close(mine["student"][key], value, atol=5e-3, rtol=0)


def test_non_finite_updates_are_skipped_counted_and_stop(raw, monkeypatch):
    real = loop.METHODS["danceopd"]
    bad = {1, 2}

    @functools.wraps(real)
    def sometimes(student, sources, batch, **keywords):
        observed = real(student, sources, batch, **keywords)
        if calls[0] in bad:
            observed.weight *= float("nan")
        calls[0] += 1
        return observed

    calls = [0]
    monkeypatch.setitem(loop.METHODS, "danceopd", sometimes)
    config = config_of(raw)
    trainer = Trainer(config, build(config))
    weights = {}
    for step in range(4):
        before = {k: v.clone() for k, v in trainer.parts.student.state_dict().items()}
        record = trainer.update()
        after = trainer.parts.student.state_dict()
        weights[step] = all(torch.equal(before[k], after[k]) for k in before)
    assert weights == {0: False, 1: True, 2: True, 3: False}
    assert record["skipped"] == 2
    calls[0], bad = 0, set(range(100))
    with pytest.raises(UserError, match="3 updates in a row"):
        distill(config_of(raw, output_dir=raw["training"]["output_dir"] + "2", max_nonfinite_steps=3))
    assert newest(type(trainer.config.training.output_dir)(raw["training"]["output_dir"] + "2"))["step"] == 3


def test_collapse_is_warned_about(raw):
    config = config_of(raw)
    trainer = Trainer(config, build(config))
    trainer.update()
    health, batch = Health(["t2i", "edit"], trainer.sigmas), trainer.draw()
    questions = trainer.ask(batch)["student"]
    seen = watched(questions, columns(questions, [matched(trainer.trained["student"], questions)]), len(batch))
    seen = replace(seen, velocity_norm=seen.target_norm)
    for _ in range(40):
        health.update(seen, 1.0)
    assert health.warnings() == {}
    health.update(seen, 50.0)  # a single spike is no drift
    assert health.warnings() == {}
    for _ in range(8):
        health.update(seen, 50.0)
    assert list(health.warnings()) == ["gradient norm"]
    noised = replace(seen, depth=torch.full_like(seen.depth, -1))  # a warm start, whose gradients are smaller
    for _ in range(40):
        health.update(noised, 1.0)
    for _ in range(20):
        health.update(seen, 50.0)
    assert health.warnings() == {}
    seen = replace(seen, velocity_norm=3 * seen.velocity_norm, state_norm=0.2 * seen.state_norm)
    for _ in range(30):
        health.update(seen, 1.0)
    text = " ".join(health.warnings().values())
    assert "velocity norm of t2i at sigma" in text
    assert "rollout state norm of edit at sigma" in text


def test_bf16_trains(raw):
    losses = [r["loss"] for r in records(distill(config_of(raw, precision="bf16", max_steps=2))) if "loss" in r]
    assert len(losses) == 2
    assert all(0 < loss < 1e3 for loss in losses)


def test_student_guidance_scale_is_per_sample(raw):
    raw["capabilities"]["t2i"]["student_guidance_scale"] = 3.0
    config = config_of(raw)
    trainer = Trainer(config, build(config))
    batch = trainer.draw()
    assert torch.equal(batch.conditioning.guidance_scale, torch.where(batch.route == 0, 3.0, 1.0))
    assert trainer.update()["loss"] > 0


def test_batch_is_a_function_of_seed_and_step():
    data = [WorldData("t2i", 30, 0), WorldData("edit", 30, 0)]
    a, b, c = (draw_batch(embedded_samples(data, 10, 32), [1, 1], 16, 0, step) for step in (3, 3, 4))
    assert torch.equal(a.noise, b.noise)
    assert torch.equal(a.conditioning.prompt, b.conditioning.prompt)
    assert not torch.equal(a.noise, c.noise)
    assert torch.equal(a.conditioning.has_source, a.route == 1)


def test_a_disk_without_room_is_found_before_training(raw, monkeypatch):
    config = config_of(raw)
    needed = 16 * sum(p.numel() for p in random_network(0).parameters())  # of one checkpoint
    usage = shutil.disk_usage(config.training.output_dir.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**24 + 3 * needed))
    with pytest.raises(UserError, match=r"3 checkpoints and the student need .*keep_checkpoints"):
        distill(config)
    distill(config_of(raw, keep_checkpoints=1))


def test_a_run_that_cannot_begin_again_is_still_there(raw, monkeypatch):
    folder = distill(config_of(raw, sample_every=0))
    before, usage = newest(folder), shutil.disk_usage(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(UserError, match="keep_checkpoints"):
            distill(config_of(raw, sample_every=0), overwrite=True)
    assert_same_state(before, newest(folder))


def test_a_trace_has_the_phases_of_the_steps_asked_for(raw):
    config = config_of(raw, profile_steps=2, sample_every=0)
    folder = distill(parse_config({**config.to_dict(), "evaluation": {"times": 0}}))
    (trace,) = (folder / "profile").iterdir()
    names = Counter(event.get("name") for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X")
    phases = ("route", "rollout", "query", "match", "backward", "step")
    assert {name: names[name] for name in phases} == dict.fromkeys(phases, 2)


def test_a_source_that_answers_nan_is_named_in_the_first_update(raw):
    config = config_of(raw)
    parts = build(config)
    parts.fields[1] = lambda latents, sigma, conditioning: torch.full_like(latents, float("nan"))
    before = {name: p.clone() for name, p in parts.student.named_parameters()}
    with pytest.raises(UserError, match=r"sources\.two: .*not finite"):
        Trainer(config, parts).update()
    assert all(torch.equal(p, before[name]) for name, p in parts.student.named_parameters())  # nothing was learnt
