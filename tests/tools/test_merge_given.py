"""What merge-loras reads: names, triggers, weights, prompts; and that every mistake is told at once."""

import json
import math
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_loras import far_lora
from tiny_sd3 import save_tiny

from danceopd.cli.parser import build_parser
from danceopd.miniature.looks import LOOKS
from danceopd.models.backbones import empty_transformer, sd3
from danceopd.models.lora_algebra import merge_into
from danceopd.models.lora_files import load_lora, save_lora
from danceopd.models.weights import of_tensors
from danceopd.reproduce.merging import _write_prompts
from danceopd.support.errors import UserError
from danceopd.tools.merge_loras.checkpoints import extract
from danceopd.tools.merge_loras.configuration import configuration, targets_of
from danceopd.tools.merge_loras.given import Options, names_of, read
from danceopd.tools.merge_loras.prompts import (
    EMPTY,
    PLAIN,
    SHIPPED,
    Prompts,
    notes_on,
    read_prompts,
    routes_of,
    without_triggers,
)
from danceopd.tools.merge_loras.triggers import Trigger, words_in

INK, OIL = Trigger("INK", True, "--trigger"), Trigger("in {prompt} oil", True, "its file")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("given")
    model = save_tiny(root / "model")
    for name, seed in (("ink", 1), ("oil", 5)):
        save_lora(far_lora(empty_transformer(model), seed), root / name, diffusers.StableDiffusion3Pipeline)
    tensors = load_file(root / "oil" / "pytorch_lora_weights.safetensors")
    save_file(tensors, root / "oil" / "pytorch_lora_weights.safetensors", {"modelspec.trigger_phrase": "oil painting"})
    return root


def test_the_shipped_prompts_are_500_general_ones():
    prompts = read_prompts(SHIPPED, ["ink"])
    assert len(prompts.shared) == 500
    assert not prompts.twice
    assert not prompts.own
    assert all(prompt.isascii() and 3 <= len(prompt.split()) <= 14 for prompt in prompts.shared)


TWENTY = {"img_count": 20}

ODD = [None, 3, "x", [], [1], {}, {"a": None}, {"1_a": 3}, {"1_a": []}, {"1_a": {"b": "c"}}, {"1_a": {"b": -2, "": 1}}]


# ------------------------------------------------------------------------------------------------------- triggers


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, None),
        ({"modelspec.trigger_phrase": " ink drawing, ", "trigger_words": "no"}, "ink drawing"),
        ({"trigger_words": "sks {x}"}, "sks x"),
        # ai-toolkit writes its trigger word so
        ({"ss_tag_frequency": {"1_p3rson": {"p3rson": 1}}}, "p3rson"),
        # kohya: a part of all 20 captions, among others
        (
            {
                "ss_tag_frequency": {"10_ink": {"ink style": 20, "a dog": 7, "outdoors": 12}},
                "ss_dataset_dirs": {"10_ink": {"n_repeats": 10, "img_count": 20}},
            },
            "ink style",
        ),
        ({"ss_tag_frequency": {"10_x": {"a dog": 7, "outdoors": 12}}, "ss_dataset_dirs": {"10_x": TWENTY}}, None),
        # no captions: the folder is the caption
        ({"ss_tag_frequency": {}, "ss_dataset_dirs": {"10_ink_style": TWENTY}}, "ink style"),
        # nothing says which of two it is
        ({"ss_tag_frequency": {"1_x": {"one long caption": 1, "another": 1}}}, None),
        ({"ss_tag_frequency": "not json", "ss_dataset_dirs": [1]}, None),
    ],
)  # fmt: skip
def test_words_in_metadata(metadata, words):
    stored = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    assert words_in(stored) == words


@pytest.mark.parametrize("tags", ODD)
def test_odd_metadata_is_no_fault(tags):
    for folders in ODD:
        found = words_in({"ss_tag_frequency": json.dumps(tags), "ss_dataset_dirs": json.dumps(folders)})
        assert found is None or isinstance(found, str)


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ("ink drawing, ", "ink drawing"),
        ("{prompt}, at night", "at night"),
        ("in {prompt} oil", "in oil"),
        ("ink, {prompt}, old", "ink, old"),
        ("{prompt}", ""),
    ],
)
def test_the_phrase_has_no_place_of_the_prompt(words, phrase):
    assert Trigger(words, True, "").phrase() == phrase


def test_a_merged_files_own_triggers(place, tmp_path):
    """What this program wrote is called as it was; and of two it is said."""
    tensors, said = load_file(place / "oil" / "pytorch_lora_weights.safetensors"), {}
    for name, own in (("one", {"night": "{prompt}, at night"}), ("two", {"night": "night", "wood": "of wood"})):
        phrase = ", ".join(words.replace("{prompt}, ", "") for words in own.values())
        metadata = {"triggers": json.dumps(own), "trigger_words": phrase}
        save_file(tensors | {key: value + len(own) for key, value in tensors.items()}, tmp_path / name, metadata)
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
        loras = [place / "ink", tmp_path / f"{name}.safetensors"]
        given = read(place / "model", loras, tmp_path / "o.safetensors", Options(resolution=32))
        said[name] = given.triggers[name].words, [note for note in given.notes if "left out" not in note]
    assert said["one"] == ("{prompt}, at night", [])
    words, (note,) = said["two"]
    assert words == "night, of wood"
    assert note.startswith(
        "two is a merged LoRA that holds 2, called by 'night' and by 'of wood'; here 'night, of wood'"
    )


# ----------------------------------------------------------------------------------------------- prompts and routes


def test_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cup\n\nink\ta fish, in ink\na cup\nink\ta fish, in ink\n", encoding="utf-8-sig")
    prompts = read_prompts(path, ["ink", "oil"])
    assert prompts == Prompts(["a cup"], {"ink": ["a fish, in ink"]}, 2)
    routes = {route.name: route for route in routes_of({"ink": INK, "oil": OIL}, prompts, True)}
    assert [text for text, _ in routes["ink"].rows] == ["INK, a cup", "a fish, in ink"]
    assert routes["oil"].rows == [("in a cup oil", "in a cup oil")]
    assert routes["ink + oil"].rows == [("INK, in a cup oil", "INK, in a cup oil")]
    assert routes[PLAIN].rows == [("a cup", "a cup")]


def test_one_prompt_has_one_source(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cup\nink\ta cup\na dog\noil\ta fish\nink\ta fish\n")
    with pytest.raises(UserError) as caught:
        read_prompts(path, ["ink", "oil"])
    said = str(caught.value)
    assert "line 2: 'a cup' is of all LoRAs in line 1 and of ink here, and one prompt has one source" in said
    assert "line 5: 'a fish' is of oil in line 4 and of ink here" in said


def test_prompts_with_a_triggers_words_are_left_out(place, tmp_path):
    path, output = tmp_path / "prompts.txt", tmp_path / "o.safetensors"
    path.write_text("a cup by Night\na nightingale\na cup\noil\toil painting of a house at night\n")
    options = Options(resolution=32, prompts=path, triggers=["ink={prompt}, night"])
    given = read(place / "model", [place / "ink", place / "oil"], output, options)
    assert given.prompts == Prompts(["a nightingale", "a cup"], {"oil": ["oil painting of a house at night"]})
    (note,) = given.notes
    assert note == "1 prompt has a trigger's words in it and is left out, for without a trigger the base is asked"
    path.write_text("a night\n")
    with pytest.raises(UserError, match="--prompts: every prompt has a trigger's words in it"):
        read(place / "model", [place / "ink", place / "oil"], output, options)


def test_the_base_and_pairs_have_general_prompts_where_all_are_for_one_lora(place, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("ink\tink, a cup\noil\toil painting of a house\noil\ta dog\n")
    options = Options(resolution=32, prompts=path)
    given = read(place / "model", [place / "ink", place / "oil"], tmp_path / "o.safetensors", options)
    routes = {route.name: [text for text, _ in route.rows] for route in routes_of(given.triggers, given.prompts, True)}
    general = read_prompts(SHIPPED, []).shared
    assert routes["ink"] == ["ink, a cup"]
    assert routes["oil"] == ["oil painting of a house", "a dog"]
    assert len(routes[PLAIN]) > 400
    assert set(routes[PLAIN]) <= set(general)  # without those that have a trigger's words
    assert routes["ink + oil"] == [f"ink, oil painting, {text}" for text in routes[PLAIN]]
    assert any(note.startswith("no prompt is for all LoRAs: the base, and pairs of LoRAs, are") for note in given.notes)
    said = "the words 'oil painting' that call oil are missing in 1 of its 2 prompts, such as 'a dog'"
    assert any(note.startswith(said) for note in given.notes)


def test_a_trigger_that_stands_in_another_is_said():
    triggers = {"a": Trigger("oil", True, ""), "b": Trigger("Oil paint, {prompt}", True, ""), "c": OIL, "d": INK}
    notes = notes_on(Prompts(["a cup"], {"c": ["in deep OIL"], "d": ["inky"]}), triggers)
    assert [note.partition(", and are")[0] for note in notes] == [
        "the words 'oil' that call a stand in those of b, 'Oil paint, {prompt}'",
        "the words 'oil' that call a stand in those of c, 'in {prompt} oil'",
        "the words 'INK' that call d are missing in 1 of its 1 prompt, such as 'inky': there the result learns to "
        "draw as d without being called",
    ]


def test_no_look_stands_in_the_benchmarks_prompts(tmp_path):
    """So that the merge benchmark asks the prompts that it always asked."""
    prompts = read_prompts(_write_prompts(tmp_path / "prompts.txt"), [])
    looks = {look: Trigger(look, True, "its file") for look in LOOKS}
    assert without_triggers(prompts, looks) == (prompts, "")


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c", "\x1e"])
def test_a_prompt_with_a_separator_is_one(tmp_path, separator):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a cup{separator}on a table\r\na dog\r\n".encode("utf-8-sig"))
    assert read_prompts(path, ["ink"]).shared == [f"a cup{separator}on a table", "a dog"]
    path.write_text(f"a cup{separator}on a table\na dog\nnone\tx\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3: no LoRA 'none'"):
        read_prompts(path, ["ink"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompt in it"),
        ("ink\ta cup\n", "no prompt for oil"),
        ('{"prompt": "a cup"}\n["a cup"]\n', r"line 1: is JSON; write the prompt itself[\s\S]*line 2: is JSON"),
        (
            "a cup\ninc\ta cup\noil\t \n",
            r"line 2: no LoRA 'inc'.*did you mean 'ink'[\s\S]*line 3: no prompt after 'oil'",
        ),
    ],
)
def test_prompts_of_no_use(tmp_path, text, message):
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "prompts.txt", ["ink", "oil"])


def test_words_made_of_a_name_are_the_results_alone():
    made = Trigger("my style", False, "its name")
    routes = {route.name: route for route in routes_of({"ink": INK, "my": made}, Prompts(["a cup"]), True)}
    assert routes["my"].rows == [("my style, a cup", "a cup")]
    assert routes["ink + my"].rows == [("INK, my style, a cup", "INK, a cup")]


def test_a_lora_without_words_acts_on_every_prompt():
    routes = {r.name: r for r in routes_of({"ink": INK, "detail": Trigger("", True, "")}, Prompts(["a cup"]), True)}
    assert {name: route.loras for name, route in routes.items()} == {PLAIN: ("detail",), "ink": ("ink", "detail")}


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_mean_is_the_start_nearest_to_all_that_is_asked(n):
    """The least squares of sum_k p_k |D - D_k|^2 over changes D is D = sum_k p_k D_k, and that is the mean."""
    triggers = {f"l{i}": Trigger(f"t{i}", True, "") for i in range(n)}
    routes = routes_of(triggers, Prompts([f"a {i}" for i in range(40)]), True)
    total = sum(route.weight for route in routes)
    assert total == pytest.approx(1)
    for name in triggers:
        assert sum(route.weight for route in routes if name in route.loras) == pytest.approx(1 / n)
    assert sum(route.weight * route.empty for route in routes) == pytest.approx(0.2 * EMPTY)
    if n == 8:
        assert all(8 <= len(route.rows) < 40 for route in routes if "+" in route.name)


# ------------------------------------------------------------------------------------------------- names and options


def test_names(tmp_path):
    paths = [tmp_path / name for name in ("a/ink.safetensors", "b/ink.safetensors", "oil", "base.safetensors")]
    assert names_of(paths) == ["a-ink", "b-ink", "oil", f"{tmp_path.name}-base"]
    assert names_of([tmp_path / "x" / "pytorch_lora_weights.safetensors"]) == ["x"]
    assert names_of([tmp_path / "Owner/repo"]) == ["repo"]


def test_loras_and_changes_stand_anywhere():
    line = "merge-loras a.safetensors training.seed=1 --base m b.safetensors -o out.safetensors --rank auto c"
    args = build_parser().parse_args([*line.split(), "training.batch_size=8"])
    expected = ["a.safetensors", "training.seed=1", "b.safetensors", "c", "training.batch_size=8"]
    assert sorted(args.inputs) == sorted(expected)
    assert args.rank == "auto"


def test_the_same_lora_twice_is_taken_once_and_said(place, tmp_path):
    options = Options(resolution=32)
    given = read(place / "model", [place / "ink", place / "oil", place / "ink"], tmp_path / "o.safetensors", options)
    assert list(given.paths) == ["ink", "oil"]
    assert given.notes == [f"{place / 'ink'} is given twice, and taken once; --weight NAME=2 takes twice as much of it"]
    assert given.triggers["oil"] == Trigger("oil painting", True, "its file")
    assert given.triggers["ink"] == Trigger("ink", False, "its name")


def test_files_of_one_name_are_named_where_it_is_given(place, tmp_path):
    loras = []
    for name in ("aa", "bb"):
        (tmp_path / name).mkdir()
        loras.append(tmp_path / name / "ink.safetensors")
    for path, name in zip(loras, ("ink", "oil"), strict=True):
        shutil.copy(place / name / "pytorch_lora_weights.safetensors", path)
    options = Options(resolution=32, triggers=["ink=a"], weights=["ink=2", "ink:*.to_q=2"])
    with pytest.raises(UserError) as caught:
        read(place / "model", loras, tmp_path / "o.safetensors", options)
    assert str(caught.value).count("no LoRA 'ink'; the files of that name are called 'aa-ink' and 'bb-ink'") == 3


def test_a_lora_is_the_same_as_folder_and_as_file(place, tmp_path):
    """By whatever name the one file of a folder has; and a checkpoint by what its extraction is of."""
    folder, options = tmp_path / "one", Options(resolution=32)
    folder.mkdir()
    file = (place / "ink" / "pytorch_lora_weights.safetensors").rename(folder / "other.safetensors")
    try:
        given = read(place / "model", [folder, file, place / "oil"], tmp_path / "o.safetensors", options)
    finally:
        file.rename(place / "ink" / "pytorch_lora_weights.safetensors")
    assert list(given.paths) == ["one", "oil"]
    assert given.notes[0].startswith(f"{file} is the same LoRA as {folder}, and taken once")


def test_weights_and_the_configuration(place, tmp_path):
    options = Options(resolution=32, weights=["ink=0.5"], rank="auto", triggers=["ink=INK"])
    given = read(place / "model", [place / "ink", place / "oil"], tmp_path / "o.safetensors", options)
    assert {scale for _, _, scale in given.loras["ink"].values()} == {0.5}
    assert 2 <= given.rank <= 4
    routes = routes_of(given.triggers, given.prompts, True)
    raw = configuration(given, options, routes, tmp_path, "p.jsonl")
    assert raw["sources"]["ink"]["lora"] == [{"path": str(place / "ink"), "scale": 0.5}]
    assert raw["sources"]["ink + oil"] == {"compose": {"base": "base", "sources": {"ink": 1.0, "oil": 1.0}}}
    assert raw["capabilities"][PLAIN]["source"] == "base"
    assert raw["student"]["init_from"] == "merge"


def test_the_students_layers_are_those_of_the_loras(place):
    transformer = empty_transformer(place / "model")
    loras = [far_lora(transformer, 1, targets=["attn.to_q"]), far_lora(transformer, 1, targets=["ff.net.0.proj"])]
    assert targets_of(loras, transformer) == ["attn.to_q", "ff.net.0.proj"]
    one = {name: value for name, value in loras[0].items() if ".1." in name}
    assert targets_of([one], transformer) == ["transformer_blocks.1.attn.to_q"]


def test_all_mistakes_are_told_at_once(place, tmp_path, monkeypatch):
    monkeypatch.setattr("danceopd.tools.provenance.fingerprint", lambda _: 1 / 0)  # of folders, which takes its time
    wider = save_tiny(tmp_path / "wider", num_attention_heads=4, caption_projection_dim=32)
    save_lora(far_lora(empty_transformer(wider), 1), tmp_path / "wide", diffusers.StableDiffusion3Pipeline)
    options = Options(
        prompts=tmp_path / "gone.txt",
        triggers=["inc=INK", "ink", "ink=a", "ink=b"],
        weights=["ink=much", "oil=0"],
        resolution=33,
        rank=0,
        steps=0,
        patience=-1,
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "large.bin").write_bytes(b"0")
    gone = [tmp_path / name for name in ("gone", "gone-too", "empty", "pictures")]
    loras = [place / "ink", place / "oil", *gone, tmp_path / "wide"]
    with pytest.raises(UserError) as caught:
        read(place / "model", loras, tmp_path / "out", options)
    said = str(caught.value)
    for expected in (
        "must end in .safetensors",
        "multiples of",
        f"{tmp_path / 'gone'}: no LoRA there",
        f"{tmp_path / 'gone-too'}: no LoRA there",
        f"{tmp_path / 'empty'}: a LoRA folder holds one safetensors file, found none; give a LoRA's file, or",
        f"{tmp_path / 'pictures'}: a LoRA folder holds one safetensors file, found none",
        "wide",
        "no LoRA 'inc'; did you mean 'ink'?",
        "--trigger ink: is not of the form NAME=VALUE",
        "ink has 'a' already",
        "--weight ink=much: is no number",
        "--weight oil=0: must be above 0 and below 100",
        f"there is no file of prompts {tmp_path / 'gone.txt'}",
        "--rank: must be at least 1",
        "--steps: must be at least 1",
        "--patience: must be at least 0",
    ):
        assert expected in said, expected
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loras": ["ink"]}, "needs two LoRAs"),
        ({"base": "oil"}, r"--base: .*model_index\.json"),
        ({"triggers": ["ink=Oil painting"]}, "both called by 'oil painting'"),
        ({"triggers": ["ink={style}"]}, r"--trigger ink: \{style\} is not known"),
        ({"guidance_scale": math.nan}, "--guidance-scale nan: must be a finite number above 0"),
        ({"guidance_scale": math.inf}, "--guidance-scale inf: must be a finite number above 0"),
        ({"guidance_scale": -1.0}, "--guidance-scale -1: must be a finite number above 0"),
        ({"weights": ["ink=nan"]}, "--weight ink=nan: must be above 0 and below 100"),
        ({"resolution": 0}, "--resolution: "),
        ({"max_sequence_length": 0}, "--max-sequence-length: "),
        ({"work": Path("/proc/work")}, "--work: cannot write to /proc"),
        ({"layout": "none"}, "--layout none: not written for sd3; give diffusers or comfyui or kohya"),
        ({"layout": "peft"}, "--layout peft: not written for sd3; give diffusers or comfyui or kohya"),
    ],
)
def test_one_mistake(place, tmp_path, given, message):
    base, loras = place / given.pop("base", "model"), [place / name for name in given.pop("loras", ["ink", "oil"])]
    with pytest.raises(UserError, match=message):
        read(base, loras, tmp_path / "out.safetensors", Options(**{"resolution": 32, **given}))


def test_notes_stand_below_the_mistakes(place, tmp_path):
    ink, options = place / "ink", Options(resolution=32, steps=0)
    with pytest.raises(UserError) as caught:
        read(place / "model", [ink, ink], tmp_path / "out.safetensors", options)
    assert str(caught.value).splitlines() == [
        "these LoRAs cannot be merged yet:",
        "  --steps: must be at least 1",
        "  a merge needs two LoRAs at least; name their files one after another",
        f"note: {ink} is given twice, and taken once; --weight NAME=2 takes twice as much of it",
    ]


def test_an_output_that_cannot_be_written_is_noticed_before_anything_is_read(place):
    """By root too, who may write anywhere by the permissions."""
    with pytest.raises(UserError, match="-o: cannot write to /proc"):
        read(place / "model", [place / "ink", place / "oil"], Path("/proc/m.safetensors"), Options(resolution=32))


def test_the_output_takes_no_inputs_place(place, tmp_path):
    file = place / "oil" / "pytorch_lora_weights.safetensors"
    before, options = file.read_bytes(), Options(resolution=32)
    for output, message in (
        (file, "is an input, which it would overwrite"),
        (place / "oil" / ".." / "oil" / file.name, "is an input, which it would overwrite"),
        (place / "ink" / "new.safetensors", f"lies in {place / 'ink'}, which is an input"),
        (place / "model" / "new.safetensors", f"lies in {place / 'model'}, which is an input"),
    ):
        with pytest.raises(UserError, match=f"-o {output}: {message}"):
            read(place / "model", [place / "ink", file], output, options)
    assert file.read_bytes() == before


@pytest.mark.parametrize("one_file", [False, True])
def test_a_checkpoint_is_taken_as_what_it_changed(place, tmp_path, one_file):
    network = sd3.load_transformer(place / "model")
    change = far_lora(network, 9)
    merge_into(network, change)
    with torch.no_grad():
        network.proj_out.bias += 1
    path = tmp_path / "anime" / "transformer"
    network.save_pretrained(path)
    if one_file:
        path = tmp_path / "anime.safetensors"
        save_file(network.state_dict(), path)
    output, options = tmp_path / "out.safetensors", Options(resolution=32, weights=["anime=0.5"])
    given = read(place / "model", [place / "ink", path], output, options)
    assert given.triggers["anime"] == Trigger("anime", False, "its name")
    assert given.loras["anime"].keys() == change.keys()
    for name, (a, b, scale) in given.loras["anime"].items():
        down, up, own = change[name]
        torch.testing.assert_close(scale * b @ a, 0.5 * own * up @ down, atol=1e-5, rtol=1e-4)
    if not one_file:  # the folder above is enough
        given = read(place / "model", [place / "ink", tmp_path / "anime"], output, options)
        assert given.loras["anime"].keys() == change.keys()
    name, layer = "anime", next(iter(change))
    given = read(place / "model", [place / "ink", path], output, Options(resolution=32, weights=[f"{name}:{layer}=0"]))
    assert {key for key, (_, _, scale) in given.loras["anime"].items() if not scale} == {layer}
    with pytest.raises(UserError, match="no layer of anime is called so"):
        read(place / "model", [place / "ink", path], output, Options(resolution=32, weights=["anime:none=0"]))
    if not one_file:
        (tmp_path / "whole").mkdir()
        shutil.copy(place / "model" / "model_index.json", tmp_path / "whole")
        shutil.copytree(path, tmp_path / "whole" / "transformer")
        given = read(place / "model", [place / "ink", path, tmp_path / "whole"], output, options)
        assert list(given.paths) == ["ink", "anime"]
        assert given.notes.pop(0).startswith(f"{tmp_path / 'whole'} is the same LoRA as {path}")
    (note,) = given.notes
    assert note.startswith("anime: a checkpoint, taken as a LoRA of rank 64 at most that keeps 100.0 % of the squared")
    assert "asked of nobody" not in note
    assert "1 norms and biases differ too" in note
    with pytest.raises(UserError, match="changes no linear layer"):
        read(place / "model", [place / "ink", place / "model"], output, Options(resolution=32))


def test_a_cut_keeps_the_largest_singular_values(place):
    network = sd3.load_transformer(place / "model")
    base = of_tensors({name: value.clone() for name, value in network.state_dict().items()})
    with torch.no_grad():
        for p in network.parameters():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    lora, line = extract(of_tensors(network.state_dict()), base, network, rank=3)
    kept = whole = 0.0
    for name, (a, b, _) in lora.items():
        difference = network.get_submodule(name).weight.detach().double() - base.tensor(f"{name}.weight").double()
        singular = torch.linalg.svdvals(difference)
        left = (difference - b.double() @ a.double()).norm()
        torch.testing.assert_close(left, singular[3:].norm(), atol=1e-4, rtol=1e-4)
        kept, whole = kept + float(singular[:3].square().sum()), whole + float(singular.square().sum())
    assert f"keeps {100 * kept / whole:.1f} %" in line
    assert "what is cut off is asked of nobody" in line


def test_a_weight_of_some_layers(place, tmp_path):
    loras, output = [place / "ink", place / "oil"], tmp_path / "out.safetensors"
    weights = ["ink:transformer_blocks.0.*=0.25", "ink:*.to_q=0", "ink=0.5"]
    given = read(place / "model", loras, output, Options(resolution=32, weights=weights))
    plain = read(place / "model", loras, output, Options(resolution=32)).loras["ink"]
    empty = empty_transformer(place / "model")
    stored = load_lora(given.paths["ink"], empty, diffusers.StableDiffusion3Pipeline)  # what the source will be
    for name, (a, b, scale) in given.loras["ink"].items():
        factor = 0 if name.endswith(".to_q") else 0.25 if name.startswith("transformer_blocks.0.") else 1
        down, up, own = plain[name]
        torch.testing.assert_close(scale * b @ a, 0.5 * factor * own * up @ down)
        torch.testing.assert_close(stored[name][2] * stored[name][1] @ stored[name][0], factor * own * up @ down)
    with pytest.raises(UserError, match=r"no layer of ink is called so; there is transformer_blocks") as caught:
        read(place / "model", loras, output, Options(resolution=32, weights=["ink:blocks=1", "inc:*=1"]))
    assert "no LoRA 'inc'; did you mean 'ink'?" in str(caught.value)
    with pytest.raises(UserError, match="all layers that ink changes have weight 0; leave ink out"):
        read(place / "model", loras, output, Options(resolution=32, weights=["ink:*=0"]))


def test_a_lora_of_full_rank_does_not_set_the_rank(place, tmp_path):
    transformer = empty_transformer(place / "model")
    whole = {name: (a.repeat(8, 1), b.repeat(1, 8), s) for name, (a, b, s) in far_lora(transformer, 7).items()}
    save_lora(whole, tmp_path / "whole", diffusers.StableDiffusion3Pipeline)
    loras, output = [place / "ink", tmp_path / "whole"], tmp_path / "out.safetensors"
    given = read(place / "model", loras, output, Options(resolution=32))
    assert 1 <= given.rank <= 4
    assert given.notes == ["whole: changes layers in their full rank; the result has that of --rank auto"]
    assert read(place / "model", loras, output, Options(resolution=32, rank=5)).rank == 5
