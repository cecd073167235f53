"""The command line as a user meets it: what it writes, what it says, how it fails."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

from danceopd.cli.parser import main
from danceopd.config.reading import load_config
from danceopd.world.build import build
from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.edits import KINDS
from danceopd.world.evaluate import evaluate_run
from danceopd.world.files import load_model, save_model
from danceopd.world.prompts import TASKS


@pytest.fixture
def tiny(tmp_path):
    """A tiny network on disk."""
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    save_model(DiT(DiTConfig(width=32, depth=1, heads=2)), path)
    return path


@pytest.fixture
def run_folder(tiny, tmp_path):
    """A finished run of two updates."""
    config = {
        "student": {"init_from": str(tiny)},
        "sources": {"t2i": {"weights": str(tiny)}, "edit": {"weights": str(tiny), "guidance_scale": 2.0}},
        "capabilities": {
            "t2i": {"source": "t2i", "task": "t2i", "data": {"world": "t2i", "size": 20}},
            "edit": {"source": "edit", "task": "edit", "data": {"world": "edit", "size": 20}},
        },
        "rollout": {"num_inference_steps": 3},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 2, "batch_size": 4},
        "evaluation": {"per_task": 1, "per_kind": 1, "times": 2, "quick": 1, "num_inference_steps": 3},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["train", "--config", str(path)]) == 0
    return tmp_path / "run"


def test_report_writes_every_row(run_folder, capsys):
    assert main(["report", str(run_folder)]) == 0
    out = capsys.readouterr().out
    assert str(run_folder / "report.html") in out
    results = json.loads((run_folder / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    assert names == ["base", "source_t2i", "source_edit", "weight_merge", "danceopd"]
    for row in results["rows"]:
        assert row["name"] in out
        assert set(TASKS) <= row["geneval"].keys()
        assert set(KINDS) <= row["gedit"].keys()
        overall = sum(row["geneval"][task] for task in TASKS) / len(TASKS)
        assert row["geneval"]["overall"] == pytest.approx(overall)
    assert results["seconds"] > 0
    assert results["network_evaluations"] > 0
    assert results["machine"]["torch"] == torch.__version__
    page = (run_folder / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert evaluate_run(run_folder)["rows"] == results["rows"]


def test_a_student_begins_as_the_mean_of_its_sources(run_folder, tiny, tmp_path, capsys):
    raw = yaml.safe_load((run_folder / "config.yaml").read_text())
    network = load_model(tiny)
    state = {key: 3 * value for key, value in network.state_dict().items()}
    network.load_state_dict(state)
    save_model(network, tmp_path / "other.safetensors")
    raw["sources"]["edit"]["weights"] = str(tmp_path / "other.safetensors")
    raw["student"] = {"init_from": "merge"}
    raw["training"] |= {"output_dir": str(tmp_path / "mean"), "max_steps": 1}
    (tmp_path / "mean.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    student = build(load_config(tmp_path / "mean.yaml")).student
    assert all(torch.allclose(value, state[key] * 2 / 3) for key, value in student.state_dict().items())
    assert main(["train", "--config", str(tmp_path / "mean.yaml"), "--dry-run"]) == 0
    assert "student: begins as the mean of t2i, edit" in capsys.readouterr().out
    assert main(["train", "--config", str(tmp_path / "mean.yaml")]) == 0
    names = [row["name"] for row in evaluate_run(tmp_path / "mean")["rows"]]
    assert names == ["source_t2i", "source_edit", "weight_merge", "danceopd"]
    smaller = DiT(DiTConfig(width=16, depth=1, heads=2, mlp_ratio=2))
    save_model(smaller, tmp_path / "other.safetensors")
    assert main(["train", "--config", str(tmp_path / "mean.yaml"), "--overwrite"]) == 2
    assert "the sources differ in size" in capsys.readouterr().err


def test_report_without_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_evaluate_writes_one_row_and_repeats(tiny, tmp_path, capsys):
    rows = []
    for name in ("a.json", "b.json"):
        command = ["evaluate", str(tiny), "--json", str(tmp_path / name), "--seed", "3", "--num-inference-steps", "2"]
        assert main([*command, "--per-task", "2", "--per-kind", "2"]) == 0
        rows.append(json.loads((tmp_path / name).read_text()))
    assert rows[0] == rows[1]
    assert rows[0]["name"] == "tiny"
    assert "overall" in rows[0]["geneval"]
    assert "average" in rows[0]["gedit"]


def test_sample_draws_a_row_for_each_combination_and_a_column_for_each_seed(tiny, tmp_path):
    out = tmp_path / "new" / "out.png"
    prompts = ["a photo of a dog", "a photo of two cats"]
    drawn = ["sample", str(tiny), *prompts, "-o", str(out), "--num-inference-steps", "2"]
    assert main([*drawn, "--seed", "5", "7", "--guidance-scale", "1", "3"]) == 0
    grid = Image.open(out)
    assert grid.size == (2 * 192, 16 + 4 * (192 + 16))
    assert main(["sample", str(tiny), prompts[1], "-o", str(out), "--num-inference-steps", "2", "--seed", "7"]) == 0
    alone = Image.open(out)
    assert alone.size == (32, 32), "a single picture has no label and is not enlarged"
    place = (192, 16 + 2 * 208 + 16, 384, 3 * 208 + 16)  # the third row: the second prompt without guidance
    assert grid.crop(place).tobytes() == alone.resize((192, 192), Image.Resampling.NEAREST).tobytes()


def test_edit_shows_what_it_edits(tiny, tmp_path):
    out, source = tmp_path / "out.png", tmp_path / "source.png"
    Image.new("RGBA", (70, 50), (255, 0, 0, 128)).save(source)
    assert main(["edit", str(tiny), str(source), "add a cup", "-o", str(out), "--seed", "1", "2"]) == 0
    grid = Image.open(out)
    assert grid.size == (2 * 192, 16 + 16 + 137 + 16 + 192)
    assert grid.getpixel((96, 100)) == (255, 127, 127)


def test_a_run_is_drawn_with_as_it_is_and_at_its_checkpoints(run_folder, tmp_path, capsys):
    draw = ["sample", "a photo of a dog", "--num-inference-steps", "2", "--seed", "3"]
    pictures = {}
    for name, what in {
        "run": [str(run_folder)],
        "file": [str(run_folder / "student.safetensors")],
        "step": [str(run_folder), "--checkpoint", "2"],
    }.items():
        out = tmp_path / f"{name}.png"
        assert main([draw[0], *what[:1], *draw[1:], *what[1:], "-o", str(out)]) == 0
        pictures[name] = Image.open(out).tobytes()
    assert pictures["run"] == pictures["file"] == pictures["step"]
    assert main(["sample", str(run_folder), "a dog", "--checkpoint", "1"]) == 2
    assert "has no checkpoint of step 1; it keeps 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--config", "nowhere.yaml"], "no configuration at nowhere.yaml"),
        (["train", "--config", "configs/demo.yaml", "training.max_step=3"], "did you mean 'max_steps'"),
        (["train", "--config", "configs/demo.yaml", "max_steps=3"], "did you mean 'training.max_steps'?"),
        (["evaluate", "nowhere.safetensors"], "nor an embedded network"),
        (["evaluate", "bsae"], "did you mean 'base'?"),
        (["sample", "bsae", "a dog"], "a LoRA or a network; did you mean 'base'?"),
        (["edit", "base", "nowhere.png", "add a cup"], "no picture at nowhere.png"),
        (["sample", "base", "a dog", "--lora", "x.safetensors"], "an embedded network; leave out --lora"),
        (["sample", "base", "a dog", "--dtype", "float16"], "an embedded network; leave out --dtype"),
        (["sample", "base", "a dog", "--base", "miniature"], "an embedded network; leave out --base"),
        (["sample", "base", "a dog", "--lora-weight", "0", "1"], "an embedded network; leave out --lora-weight"),
        (["sample", "miniature", "a dog", "--resolution", "50"], "height and width must be multiples of 16, got 50"),
        (["sample", "miniature", "a dog", "--max-sequence-length", "999"], "max_sequence_length must be from 1 to 512"),
        (["sample", "miniature", "a dog", "--solver", "heun"], "as its pipeline does; leave out --solver"),
        (["sample", "miniature", "a dog", "--lora-weight", "0.5"], "--lora-weight needs a LoRA"),
        (["sample", "miniature", "a dog", "--checkpoint", "5"], "--checkpoint is of a run"),
        (["sample", "nowhere", "a dog"], "there is no nowhere; give a run's folder, a pipeline, a LoRA"),
        (["sources", "train", "--only", "nothing"], "no source 'nothing'"),
        (["data", "check", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_are_said_without_a_trace(arguments, says, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_an_embedded_network_is_drawn_on_the_device_that_is_asked_for(tiny, capsys):
    assert main(["sample", str(tiny), "a dog", "--device", "cuda"]) == 2
    assert "no CUDA device is available" in capsys.readouterr().err


def test_damaged_weights(tiny, capsys):
    tiny.write_bytes(tiny.read_bytes()[:500])
    assert main(["evaluate", str(tiny)]) == 2
    assert "is not a whole DanceOPD network" in capsys.readouterr().err


def test_data_check_and_world(tmp_path, capsys):
    folder = tmp_path / "world"
    assert main(["data", "world", str(folder), "--size", "3"]) == 0
    manifest = folder / "manifest.jsonl"
    assert main(["data", "check", str(manifest), "--needs-source", "edit"]) == 0
    assert "no problems" in capsys.readouterr().out
    with open(manifest, "a") as file:
        file.write('{"id": "x", "task": "edit", "prompt": "add a cup", "source_image": "gone.png"}\n')
    assert main(["data", "check", str(manifest)]) == 1
    out = capsys.readouterr().out
    assert "line 7" in out
    assert "gone.png" in out


def test_train_py_is_the_same_training(run_folder, tmp_path):
    command = [sys.executable, "train.py", "--config", str(run_folder / "config.yaml")]
    other = tmp_path / "other"
    subprocess.run([*command, f"training.output_dir={other}"], check=True, capture_output=True)
    assert (other / "student.safetensors").read_bytes() == (run_folder / "student.safetensors").read_bytes()


def test_python_m_danceopd(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["danceopd", "sources"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("danceopd", run_name="__main__")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in ("base", "t2i", "edit", "local", "global", "style"):
        assert f"{name}.safetensors" in out


WITHOUT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from danceopd.cli import main
for command in sys.argv[1:]:
    print("===", main(command.split()), flush=True)
"""


def test_without_an_optional_package_a_command_says_in_a_line_how_to_install_it(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    data = {"a": {"source": "a", "task": "t2i", "data": {"prepared": "a.jsonl"}}}
    config = {"model": "model", "student": {"lora": {"rank": 4}}, "sources": {"a": {}}, "capabilities": data}
    config["training"] = {"output_dir": "out", "max_steps": 1, "batch_size": 1}
    for place in ("c.yaml", "run/config.yaml"):
        (tmp_path / place).write_text(yaml.safe_dump(config))
    (tmp_path / "p.txt").write_text("a fish\n")
    commands = [
        "data prepare p.txt --model model --cache cache",
        "merge-loras a.safetensors b.safetensors --base model -o m.safetensors training.batch_size=2",
        "train --config c.yaml --dry-run",
        "train --config c.yaml",
        "export run -o exported",
        "report run",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, *commands], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("=== 2") == len(commands), ran.stdout
    assert ran.stderr.count("pip install 'danceopd[models]'") == len(commands), ran.stderr
