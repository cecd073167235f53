"""Reading a configuration: overrides are typed, files that are none are named."""

import re
from pathlib import Path

import pytest
import yaml
from config_mistakes import DEMO

from danceopd.config.reading import load_config, parse_config, read_yaml
from danceopd.support.errors import UserError


def test_overrides_are_typed():
    config = load_config(DEMO, ["training.learning_rate=1e-3", "training.max_steps=4", "rollout.solver=heun"])
    assert (config.training.learning_rate, config.training.max_steps) == (1e-3, 4)
    assert config.rollout.solver == "heun"


def test_round_trip_through_yaml():
    config = load_config(DEMO)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_missing_file_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'configs/demo\.yaml'"):
        load_config("configs/dmo.yaml")


def test_a_configuration_that_ships_is_named_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no configuration at configs/dmo\.yaml; did you mean 'configs/demo\.yaml'"):
        load_config("configs/dmo.yaml")
    with pytest.raises(UserError, match=r"no configuration at other\.yaml$"):
        load_config("other.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1", "", "\x00"])
def test_not_a_configuration(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {seed: 1}\nmodel: a\ntraining: {seed: 2}\n", "'training' stands twice, in lines 1 and 3"),
        ("training:\n  seed: 3\n  'seed': 3\n", "'seed' stands twice, in lines 2 and 3"),
        ("sources:\n  a: {lora: [{path: x,\n     path: y}]}\n", "'path' stands twice, in lines 2 and 3"),
        ("<<: {a: 1}\n<<: {a: 2}\n", "'<<' stands twice"),
        ("a: " + "[" * 3000 + "]" * 3000, "nests too deep"),
        ("a: &a [*a]", "nests too deep, or in itself"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: 0x" + "9" * 5000, "more than 300 digits"),
        ("\n".join([f"k0: &k0 [{'1,' * 9}]"] + [f"k{i}: &k{i} [{f'*k{i - 1},' * 9}]" for i in range(1, 12)]), "200000"),
        ("a: 1\nb: [", "it is not YAML in line 2: expected the node content, but found '<stream end>'"),
        ('a: "x\\0y"', "'x\\x00y' holds a null character"),
        ('"\\ud83d": 1', "'\\ud83d' holds a null character, or half of one"),
        ('a: [{b: "c\\udfff"}]', "'c\\udfff' holds a null character, or half of one"),
    ],
)
def test_what_yaml_would_pass_over_or_choke_on(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"cannot read .*bad\.yaml: .*{re.escape(said)}"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"), [("", "bad.yaml is empty; a configuration has keys"), ("3", "holds the value '3' alone")]
)
def test_a_file_without_keys_is_said_in_words(tmp_path, text, said):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_config(tmp_path / "bad.yaml")


def test_overrides_that_are_no_yaml():
    for value in ("9" * 5000, "{a: 1, a: 2}", "[" * 3000):
        with pytest.raises(UserError, match="the value of override"):
            load_config(DEMO, [f"training.seed={value}"])


def test_what_looks_like_a_text_stays_one():
    """YAML 1.1 makes a boolean of no, 8 of 010, 90 of 1:30, and a date that is no path of 2026-11-30."""
    config = load_config(
        DEMO,
        [
            "training.seed=010",
            "training.output_dir=2026-11-30",
            "student.init_from=1:30",
            "training.max_steps=1_000",
            "training.learning_rate=+1",
            "training.ema_decay=.5",
            "evaluation={times: 0x10}",
        ],
    )
    assert (config.training.seed, config.training.max_steps, config.evaluation.times) == (10, 1000, 16)
    assert (str(config.training.output_dir), config.student.init_from) == ("2026-11-30", "1:30")
    assert config.training.ema_decay == 0.5
    raw = yaml.safe_load(Path(DEMO).read_text().replace("  t2i: {source", "  'no': {source"))
    written = yaml.safe_dump(parse_config(raw).to_dict()).replace("'no'", "no")
    assert "no" in parse_config(read_yaml(written)).capabilities


@pytest.mark.parametrize("key", ["training.batch_size", "training.learning_rate", "query.k", "capabilities.t2i.weight"])
def test_true_is_no_number(key):
    with pytest.raises(UserError, match=rf"{key}: must be a number, found True"):
        load_config(DEMO, [f"{key}=true"])


def test_true_is_no_number_among_a_methods_options():
    with pytest.raises(UserError, match=r"options\.warm_start: must be a number"):
        load_config(DEMO, ["options={warm_start: true}"])


def test_a_merged_mapping_may_be_changed_and_an_override_reaches_no_other(tmp_path):
    text = (
        Path(DEMO)
        .read_text()
        .replace("  t2i: {source", "  t2i: &one {source")
        .replace("  edit: {source", "  edit: {<<: *one, source")
    )
    assert text.count("*one") == 1
    path = tmp_path / "merged.yaml"
    path.write_text(text)
    assert load_config(path) == load_config(DEMO)
    shared = yaml.safe_load(Path(DEMO).read_text())
    shared["sources"]["t2i"] = shared["sources"]["edit"]  # one object, as an alias makes it
    config = parse_config(shared, ["sources.t2i.guidance_scale=3"])
    assert (config.sources["t2i"].guidance_scale, config.sources["edit"].guidance_scale) == (3, 1)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(DEMO, ["training.output_dir=~/runs/a", "student.init_from=~/net.safetensors"])
    assert config.training.output_dir == tmp_path / "runs" / "a"
    assert config.student.init_from == str(tmp_path / "net.safetensors")


def test_a_marked_file_and_one_in_another_case(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(Path(DEMO).read_text(), encoding="utf-8-sig")
    assert load_config(path) == load_config(DEMO)
    with pytest.raises(UserError, match=r"there is .*run\.yaml, with other upper and lower case"):
        load_config(tmp_path / "Run.yaml")


def write_chain(folder, **files):
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_a_file_extends_another_key_by_key(tmp_path):
    write_chain(
        tmp_path,
        one="extends: below/two.yaml\ntraining: {seed: 5}\ncapabilities: {edit: {weight: 3}}\n",
        **{"below/two": "extends: ../three.yaml\ntraining: {seed: 4, max_steps: 7}\n"},
        three=Path(DEMO).read_text(),
    )
    config, demo = load_config(tmp_path / "one.yaml", ["training.batch_size=8"]), load_config(DEMO)
    assert (config.training.seed, config.training.max_steps, config.training.batch_size) == (5, 7, 8)
    assert config.capabilities["edit"].weight == 3
    assert config.capabilities["edit"].data == demo.capabilities["edit"].data
    assert config.sources == demo.sources
    assert parse_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"one": "extends: oen.yaml"}, r"no configuration at .*oen\.yaml \(which .*one\.yaml extends\); did you mean"),
        ({"one": "extends: [two.yaml]"}, r"one\.yaml: extends must be the path of one file, found \['two\.yaml'\]"),
        ({"one": "extends: 3"}, r"one\.yaml: extends must be the path of one file, found 3"),
        ({"one": "extends: one.yaml"}, r"one\.yaml extends .*one\.yaml: a circle"),
        (
            {"one": "extends: two.yaml", "two": "extends: one.yaml"},
            r"one\.yaml extends .*two\.yaml extends .*one\.yaml: a circle",
        ),
        ({"one": "extends: two.yaml", "two": "- 1"}, r"two\.yaml \(which .*one\.yaml extends\) holds a list"),
        ({"one": "extends: two.yaml", "two": "a: [1"}, r"cannot read .*two\.yaml \(which .*one\.yaml extends\)"),
        (
            {"one": "extends: two.yaml\ntrainning: {seed: 1}", "two": "training: {output_dir: x}"},
            r"one\.yaml has .*mistakes[\s\S]*trainning: unknown key",
        ),
    ],
)
def test_what_is_wrong_with_what_a_file_extends_is_said(tmp_path, files, said):
    write_chain(tmp_path, **files)
    with pytest.raises(UserError, match=said):
        load_config(tmp_path / "one.yaml")


def test_values_and_overrides_extend_nothing(tmp_path):
    for values, overrides in (({"extends": "a.yaml"}, []), ({}, ["extends=a.yaml"])):
        with pytest.raises(UserError, match="extends stands in a file alone"):
            parse_config(values, overrides)


def test_configurations_that_ship_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/demo.yaml").method == "danceopd_fast"
    assert load_config("configs/models/z-image-c.yaml").student.lora.rank == 128  # by what it extends
    with pytest.raises(UserError, match="no configuration at configs/nothing"):
        load_config("configs/nothing.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("method: joint\n")
    with pytest.raises(UserError, match="sources"):
        load_config("configs/demo.yaml")  # the one that is here, whatever it lacks
