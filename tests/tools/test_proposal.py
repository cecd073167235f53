"""danceopd init: what it writes for LoRAs of a model, that it is read as a configuration, and what it refuses."""

import json
import shlex

import pytest
import yaml
from safetensors.torch import load_file, save_file

from danceopd.cli.parser import build_parser, main
from danceopd.config.reading import load_config
from danceopd.models.lora_files import lora_file
from danceopd.tools.merge_loras.prompts import SHIPPED


@pytest.fixture
def place(prepared_places, tmp_path, monkeypatch):
    """A folder with the LoRAs ink (whose file has trigger words) and oil (whose has none), and the model's path."""
    shared = prepared_places("sd3")
    given = [lora_file(shared / name) for name in ("one", "two")]
    (tmp_path / "loras").mkdir()
    for name, path, metadata in zip(("ink", "oil"), given, ({"trigger_words": "INK style"}, {}), strict=True):
        save_file(load_file(path), tmp_path / "loras" / f"{name}.safetensors", {"format": "pt", **metadata})
    monkeypatch.chdir(tmp_path)
    return shared / "model"


def test_a_folder_of_loras_is_enough(place, tmp_path, capsys):
    assert main(["init", "loras", "--base", str(place), "--card", "rtx-4090"]) == 0
    said = capsys.readouterr().out
    config = load_config(tmp_path / "danceopd.yaml")
    assert str(config.model) == str(place)
    assert config.sources.keys() == {"base", "ink", "oil", "oil_plain"}
    assert [str(lora.path) for lora in config.sources["ink"].lora] == ["loras/ink.safetensors"]
    assert {name: c.source for name, c in config.capabilities.items()} == {
        "base": "base",
        "ink": "ink",
        "oil": "oil_plain",
    }
    assert (config.training.optimizer, config.training.gradient_checkpointing) == ("adamw_8bit", True)
    rows = [json.loads(line) for line in (tmp_path / "danceopd-prompts.jsonl").read_text().splitlines()]
    first = SHIPPED.read_text(encoding="utf-8").splitlines()[0]
    asked = {row["task"]: (row["prompt"], row["heard"]) for row in rows if row["id"].endswith("-0")}
    assert asked == {
        "base": (first, first),
        "ink": (f"INK style, {first}", f"INK style, {first}"),
        "oil": (f"oil, {first}", first),
    }
    text = (tmp_path / "danceopd.yaml").read_text()
    steps = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#    danceopd")]
    assert [step.split()[1] for step in steps] == ["data", "train", "train", "watch", "report", "export"]
    for step in steps:
        assert step in said
        build_parser().parse_args(shlex.split(step)[1:])
    assert "--texts '{heard}'" in steps[0]
    assert "student, trainable" in said, "the dry run"
    assert "not encoded yet: the data of 3 capabilities" in said


def test_the_adapter_has_the_layers_that_the_loras_change(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "miniature/night", "miniature/wood", "--base", "miniature", "--card", "h100"]) == 0
    said = capsys.readouterr().out
    assert load_config(tmp_path / "danceopd.yaml").student.lora.targets == "all-linear"
    assert "not encoded yet: the data of 3 capabilities" in said
    assert "cannot start" not in said
    assert "the student's adapter lacks" not in said


def test_its_steps_lead_to_a_trained_student(place, tmp_path, capsys):
    assert main(["init", "loras", "--base", str(place), "--card", "cpu", "-o", "both.yaml"]) == 0
    rows = (tmp_path / "both-prompts.jsonl").read_text().splitlines()
    few = [row for row in rows if int(json.loads(row)["id"].rpartition("-")[2]) < 2]
    (tmp_path / "both-prompts.jsonl").write_text("\n".join(few) + "\n")
    prepare = ["data", "prepare", "both-prompts.jsonl", "--model", str(place), "--cache", "both-cache"]
    assert main([*prepare, "--texts", "{heard}", "--resolution", "32", "--dtype", "float32"]) == 0
    short = ["training.max_steps=1", "training.batch_size=3", "training.gradient_accumulation_steps=1"]
    short += ["training.sample_every=0", "rollout.num_inference_steps=2"]
    assert main(["train", "--config", "both.yaml", *short]) == 0
    assert list((tmp_path / "runs" / "both" / "student").glob("*.safetensors"))
    capsys.readouterr()
    draw = ["sample", "runs/both", "a fox", "--num-inference-steps", "2", "--resolution", "32", "--seed", "1"]
    assert main([*draw, "--lora-weight", "0", "1", "-o", "out.png"]) == 0
    assert main([*draw, "--checkpoint", "1", "-o", "step.png"]) == 0
    assert capsys.readouterr().out == "wrote out.png\nwrote step.png\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "not known: LoRAs, or a folder of them; give them as arguments"),
        (["loras"], "no file names it; give --base MODEL"),
        (["nowhere", "--base", "x"], "no LoRA there"),
        (["loras", "--base", "x"], "there is no x; give a pipeline's folder, or an id such as owner/name"),
        (["loras", "--base", "MODEL", "--edit", "ikn"], "--edit names no source 'ikn'; did you mean 'ink'?"),
        (["loras", "--base", "MODEL", "--edit", "ink"], "draws from text alone; leave out --edit"),
        (["loras", "--base", "MODEL", "--data", "no.jsonl"], "no manifest at no.jsonl"),
    ],
)
def test_what_is_missing_is_named(place, arguments, says, capsys, tmp_path):
    assert main(["init", *(str(place) if word == "MODEL" else word for word in arguments)]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("*.yaml"))


def manifest_of(path, rows):
    path.write_text("".join(json.dumps({"id": f"r{i}", **row}) + "\n" for i, row in enumerate(rows)))
    return path


def test_rows_that_are_cut_or_left_out_are_named_before_anything_is_encoded(tmp_path, monkeypatch, capsys):
    """The miniature reads 16 tokens of a prompt."""
    monkeypatch.chdir(tmp_path)
    init = ["init", "miniature/night", "miniature/wood", "--base", "miniature", "--card", "cpu"]
    night, wood = ({"task": name, "prompt": f"{name}, a red cup"} for name in ("night", "wood"))
    long = wood | {"prompt": "wood, " + "a red cup and a blue box and " * 5}
    manifest_of(tmp_path / "rows.jsonl", [night, wood, long, {"task": "wood", "prompt": ""}])
    assert main([*init, "--data", "rows.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "warning: of 3 prompts 1 is longer than the 16 tokens of tokenizer and cut there: r2\n" in said
    assert "warning: 1 row of rows.jsonl will be left out; danceopd data check rows.jsonl says why" in said
    assert main([*init, "-o", "own.yaml"]) == 0
    said = capsys.readouterr().out
    assert "of 900 prompts 826 are longer than the 16 tokens of tokenizer and cut there: base-0" in said


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{"task": "ink", "prompt": "a cup"}],
            "has no row whose task is oil; its tasks are ink. Write oil as the task",
        ),
        ([{"prompt": "a cup"}], "has no row whose task is ink; its tasks are default"),
        ([{"task": "ink", "prompt": ""}], "has no row that can be read; danceopd data check rows.jsonl says why"),
        ([{"task": "ink", "prompt": "a"}, {"task": "oil"}], "is oil (1 row cannot be read; danceopd data check"),
        ([], "rows.jsonl is empty"),
    ],
)
def test_data_without_rows_for_a_lora_is_refused(place, tmp_path, capsys, rows, says):
    manifest_of(tmp_path / "rows.jsonl", rows)
    assert main(["init", "loras", "--base", str(place), "--data", "rows.jsonl"]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("*.yaml"))


def test_a_configuration_that_is_there_stays(place, tmp_path, capsys):
    (tmp_path / "danceopd.yaml").write_text("mine")
    assert main(["init", "loras", "--base", str(place)]) == 2
    assert "is there already; give another -o, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "danceopd.yaml").read_text() == "mine"


def test_in_a_terminal_it_asks(place, tmp_path, monkeypatch, capsys):
    """For each thing that no option gives, and again where the answer is of no use."""
    asked = []
    answers = [
        *("lora", "loras"),  # there is none of this name, and then all of a folder
        *("", "modle", str(place)),
        *("inc", "none"),
        *("rows.jsonl", "others.jsonl", "none"),
        *("rtx4090", "rtx-4090"),
        *("0", "two", "2"),
    ]

    def answer(question):
        asked.append(question)
        return answers[len(asked) - 1]

    manifest_of(tmp_path / "others.jsonl", [{"task": "paper", "prompt": "a cup"}])
    monkeypatch.setattr("danceopd.cli.init._asks", lambda: True)
    monkeypatch.setattr("builtins.input", answer)
    assert main(["init"]) == 0
    said = capsys.readouterr().out
    assert len(asked) == len(answers)
    assert list(dict.fromkeys(question.split(" [")[0] for question in asked)) == [
        *("LoRAs, or a folder of them: ", "the pipeline that they are for: ", "which of ink, oil edit pictures"),
        *("a manifest of your own prompts", "what trains, a card or cpu", "how many of them"),
    ]
    for message in ("no LoRA there", "there is no modle", "'inc' is not known; did you mean 'ink'?"):
        assert message in said
    for message in ("there is no manifest at rows.jsonl", "did you mean 'rtx-4090'?", "'0' is no number of cards"):
        assert message in said
    assert "others.jsonl has no row whose task is ink; its tasks are paper" in said
    assert "--num_gpus 2" in said


def test_in_a_terminal_what_is_given_is_not_asked(place, tmp_path, monkeypatch):
    answers = iter(["none", "none"])
    monkeypatch.setattr("danceopd.cli.init._asks", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert main(["init", "loras", "--base", str(place), "--card", "cpu"]) == 0
    assert yaml.safe_load((tmp_path / "danceopd.yaml").read_text())["training"]["precision"] == "fp32"
    assert next(answers, None) is None


def test_a_base_that_is_not_there_ends_with_2_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "miniature/night", "miniature/wood", "--base", "nonsense", "--card", "cpu"]) == 2
    said = capsys.readouterr()
    assert "nonsense" in said.out + said.err
