"""merge-loras: from two LoRAs to one adapter of the size of one that is nearer to both than their mean."""

import html
import json
import os
import re
import shlex
import signal
from html.parser import HTMLParser

import diffusers
import pytest
import tiny_flux
import torch
import yaml
from config_mistakes import DEMO
from safetensors import safe_open
from small_loras import far_lora
from tiny_sd3 import save_tiny

from danceopd.cli.parser import main
from danceopd.config.reading import load_config
from danceopd.core.conditioning import Conditioning
from danceopd.core.distance import velocity_error
from danceopd.models.backbones import empty_transformer, flux, sd3
from danceopd.models.lora_algebra import average
from danceopd.models.lora_files import load_lora, save_lora
from danceopd.models.shared_base import SharedBase
from danceopd.tools.merge_loras.compare import AVERAGE, BASE, MERGED, Results, judge, shares_of
from danceopd.tools.merge_loras.gaps import GROWTH, Gaps, mean_share, settled
from danceopd.tools.merge_loras.prompts import PLAIN, Route

SD3, STEPS = diffusers.StableDiffusion3Pipeline, 2
WORDS = ["cup", "car", "cat", "tree", "house", "lamp", "boat", "bird"]
TRIGGERS = {"ink": "INK", "oil": "???"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    model = save_tiny(root / "model")
    for name, seed in (("ink", 1), ("oil", 5)):
        save_lora(far_lora(empty_transformer(model), seed, targets=sd3.LORA_TARGETS), root / name, SD3)
    (root / "prompts.txt").write_text("".join(f"a {word}\n" for word in WORDS))
    return root


def command(place, output, *more, triggers=TRIGGERS, model=None):
    given = [place / "ink", place / "oil", "--base", model or place / "model", "--resolution", 32, "-o", output]
    given += ["--prompts", place / "prompts.txt"]
    for name, words in triggers.items():
        given += ["--trigger", f"{name}={words}"]
    settings = [f"rollout.num_inference_steps={STEPS}", "training.batch_size=8", "training.ema_decay=0.8"]
    return ["merge-loras", *map(str, given), *more, *settings, "training.warmup_steps=1"]


class Pictures(HTMLParser):
    """The pictures of a page: what each shows, and whether it is in the page."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, bool]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.append((dict(attrs)["alt"], dict(attrs)["src"].startswith("data:image/")))


def interrupting(measure):
    """Sends a Ctrl-C after the third update's scores."""
    calls = []

    def measured(self, network):
        calls.append(network)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(self, network)

    return measured


# Long: one run, of which everything that a user gets is looked at.
def test_nearer_to_each_than_the_average(place, tmp_path, monkeypatch, capsys):
    output = tmp_path / "merged.safetensors"
    learn = "training.learning_rate=4e-2"
    assert main(command(place, output, "--dry-run", "--weight", "ink:*.to_q=0.5", learn)) == 0
    said = capsys.readouterr().err
    assert "time: by a forward that the run itself times" in said
    assert "ink: rank 2, weight 1, of layers *.to_q=0.5, called by" in said
    assert main(command(place, output, "--dry-run", learn)) == 0
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().err
    assert "ink: rank 2, weight 1, called by 'INK' (--trigger)" in said
    assert "memory, an estimate without activations: " in said
    line = command(place, output, "--steps", "40", "--patience", "0", learn)
    with monkeypatch.context() as patched:
        patched.setattr(Gaps, "__call__", interrupting(Gaps.__call__))
        assert main(line) == 130
    assert "stopped; run the same command again to go on" in capsys.readouterr().err
    assert main(line) == 0
    said = capsys.readouterr()
    assert "going on from step 6" in said.out
    assert re.findall(r"gap closed at step (\d+): no trigger", said.err) == [str(step) for step in range(8, 41, 2)]
    assert "result: rank 2; at most 34 more updates of 8 samples" in said.err
    assert re.search(r"time, a prediction: .* for 34 updates, 17 scorings and the comparison", said.err)
    assert "memory, an estimate: " in said.err
    for row in ("base", "ink", "oil", "plain average", "PEFT's", "this merge"):
        assert f"\n  {row} " in said.out, row

    results = json.loads((tmp_path / "merged.work" / "rank-2" / "comparison.json").read_text())
    assert results["samples"] == dict.fromkeys(results["routes"], 4)
    assert results["routes"] == [PLAIN, "ink", "oil", "ink + oil"]
    assert results["shares"][BASE] == {PLAIN: 1.0, "ink": 0.0, "oil": 0.0, "ink + oil": 0.0}
    assert [results["shares"][name][name] for name in TRIGGERS] == pytest.approx([1.0, 1.0])
    assert results["errors"][MERGED].keys() == results["errors"][AVERAGE].keys()

    transformer = sd3.load_transformer(place / "model")
    sources = [load_lora(place / name, transformer, SD3) for name in TRIGGERS]
    student = load_lora(output, transformer, SD3)
    sizes = [sum(a.numel() + b.numel() for a, b, _ in lora.values()) for lora in (*sources, student)]
    assert sizes[0] == sizes[1] == sizes[2]
    # On prompts that it never saw, and noise of its own: each LoRA by its trigger, and the base without.
    encode, sigmas = sd3.text_encoder(place / "model"), sd3.sigmas(place / "model", STEPS, 32, 32)
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(9))
    shared = SharedBase(transformer, [*sources, average(sources), student], sd3.velocity)
    for m, trigger in {0: "INK, ", 1: "???, ", -1: ""}.items():
        prompt = encode([f"{trigger}a {word}" for word in ("chair", "horse", "spoon", "clock")])
        asked = noise, Conditioning(prompt, None, torch.zeros(4, dtype=torch.bool)), sigmas
        mean, distilled = (velocity_error(shared.field(i), shared.field(m), *asked) for i in (2, 3))
        print(f"{trigger or 'base'}: average {mean:.4f}, distilled {distilled:.4f}")
        assert distilled < 0.9 * mean

    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == metadata["trigger_words"] == "INK, ???"
    assert json.loads(metadata["triggers"]) == TRIGGERS
    # The page's command for ComfyUI gives the same words, though no LoRA's own file has any.
    page = (tmp_path / "merged.html").read_text()
    (line,) = [html.unescape(text) for text in page.splitlines() if "danceopd export" in text]
    words = shlex.split(line.partition('<pre class="wrap">')[2])
    words[words.index("-o") + 1] = str(tmp_path / "comfyui_lora")
    assert main(words[1:]) == 0
    with safe_open(tmp_path / "comfyui_lora" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["trigger_words"] == "INK, ???"
    card = (tmp_path / "comfyui_lora" / "README.md").read_text()
    assert "# model: ink + oil\n" in card
    assert "Words that call it in a prompt: INK, ???." in card
    pipeline = SD3.from_pretrained(place / "model")
    pipeline.load_lora_weights(tmp_path, weight_name="merged.safetensors")
    assert pipeline.get_active_adapters()
    pictures = Pictures(page).found
    assert len(pictures) == 2 * 3 + 3 * 2 * 4  # what is wanted without a trigger is the base
    assert all(inside for _, inside in pictures)
    assert sum(alt.startswith("this merge: INK, ") for alt, _ in pictures) == 4  # two of ink, two of the pair
    assert f'load_lora_weights("{tmp_path}", weight_name' in html.unescape(page)  # wherever the command ran
    for text in (
        "load_lora_weights(",
        "--layout comfyui",
        "ComfyUI/models/loras",
        "called by",
        "in 2 steps of euler, seed",
    ):
        assert text in page


def test_a_run_that_learns_nothing_ends_and_is_told_to_be_worse(place, tmp_path, monkeypatch, capsys):
    """Of a model that embeds its guidance, whose LoRAs go to kohya's layout."""
    model = tiny_flux.save_tiny(tmp_path / "model", pipeline="FluxPipeline", guidance_embeds=True)
    for name, seed in (("ink", 1), ("oil", 5)):
        # So near to the base that what they add, adds up: then a cut of the mean is farther than the mean.
        lora = far_lora(empty_transformer(model), seed, targets=["to_q", "to_v", "proj_out"])
        lora = {layer: (a, b, 0.05) for layer, (a, b, _) in lora.items()}
        save_lora(lora, tmp_path / name, diffusers.FluxPipeline)
    (tmp_path / "prompts.txt").write_text("a cup\na car\n")
    asked, evaluated, original = set(), [], flux.velocity

    def velocity(*args):
        if isinstance(args[-1], torch.Tensor):  # not while memory is counted
            asked.update(args[-1].tolist())
            evaluated.append(len(args[-1]))
        return original(*args)

    monkeypatch.setattr(flux, "velocity", velocity)
    output = tmp_path / "out.safetensors"
    more = ["--guidance-scale", "3.5", "--layout", "kohya", "--steps", "9", "--patience", "1", "--rank", "1"]
    line = command(tmp_path, output, *more, "--no-pairs", "training.learning_rate=1e-12", triggers={"ink": "INK"})
    assert main(line) == 1
    said = capsys.readouterr()
    assert "WORSE than the plain average" in said.out
    assert "training has ended after 1 of 9 updates: the mean share of the gaps has not grown by 0.5 %" in said.err
    assert "Do not use it as it is. Train longer" in said.out
    assert "oil: no file says which words call it" in said.err
    shares = json.loads((tmp_path / "out.work" / "rank-1" / "comparison.json").read_text())["shares"]
    assert shares["oil"]["oil"] == pytest.approx(1.0)  # the LoRA hears no word that it does not know
    assert asked == {3.5}
    run = tmp_path / "out.work" / "rank-1"
    config = yaml.safe_load((run / "config.yaml").read_text())
    networks = [source for name, source in config["sources"].items() if "words" not in name]
    assert {source["guidance_scale"] for source in networks} == {1.0}
    records = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "evaluation" in record] == [0, 1]  # it did not grow
    flux_model = empty_transformer(model), diffusers.FluxPipeline
    whole = load_lora(run / "student", *flux_model)
    back = load_lora(output, *flux_model)
    with safe_open(output, framework="pt") as file:
        assert all(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118
    for name, (a, b, scale) in whole.items():
        torch.testing.assert_close(back[name][2] * back[name][1] @ back[name][0], scale * b @ a)
    # It is finished, and so the comparison is all that is left: of as many evaluations as are said.
    evaluated.clear()
    assert main(line) == 1
    (said,) = re.findall(r"at most 0 more updates of 8 samples, .* each; ([\d,]+) in all", capsys.readouterr().err)
    beside = 2 * 4 + 2 * 3  # two timed forwards; and student and source of each route, as a training begins
    assert sum(evaluated) - beside == int(said.replace(",", ""))
    # A run goes on with what it began with, and nothing is encoded for another.
    monkeypatch.setattr(flux, "text_encoder", lambda *_: 1 / 0)
    for more, what in (
        (["--trigger", "oil=OIL"], "--prompts, --trigger or --no-pairs differ"),
        (["--weight", "oil=0.5"], "--weight differs"),
        (["--weight", "oil:*.to_q=0.5"], "--weight differs"),
        (["--guidance-scale", "2"], "--guidance-scale differs"),
    ):
        assert main([*line, *more]) == 2
        said = capsys.readouterr().err
        assert f"{what} from the run in {tmp_path / 'out.work' / 'rank-1'}: give --work OTHER, or --overwrite" in said
    # More steps go on, and so they end early anew.
    more = ["12" if text == "9" and line[i - 1] == "--steps" else text for i, text in enumerate(line)]
    assert main(more) == 1
    said = capsys.readouterr()
    assert "at most 11 more updates" in said.err
    assert "going on from step 1 " in said.out
    assert "training has ended after 2 of 12 updates" in said.err
    # A page that something else wrote stays too.
    page = tmp_path / "out.html"
    written = page.read_bytes()
    page.write_text("mine")
    assert main(more) == 2
    said = f"{page} is there, and the run in {run} did not write it; give another file, or --overwrite"
    assert said in capsys.readouterr().err
    assert page.read_text() == "mine"
    page.write_bytes(written)
    # What another run has written stays; what the run itself wrote is written again.
    written = output.read_bytes()
    other = ["2" if text == "1" and line[i - 1] == "--rank" else text for i, text in enumerate(line)]
    assert main(other) == 2
    said = f"-o {output}: {output} is there, and the run in {tmp_path / 'out.work' / 'rank-2'} did not write it"
    assert said in capsys.readouterr().err
    assert output.read_bytes() == written
    assert main([*line, "--dry-run"]) == 0
    # The plain merge that is as good lies beside it.
    plain = load_lora(tmp_path / "out.peft.safetensors", *flux_model)
    assert plain.keys() == {layer for name in ("ink", "oil") for layer in load_lora(tmp_path / name, *flux_model)}
    with safe_open(tmp_path / "out.peft.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["triggers"]) == {"ink": "INK"}


def test_what_is_wrong_is_said_before_anything_is_encoded(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sd3, "text_encoder", lambda *_: 1 / 0)
    output = tmp_path / "out.safetensors"
    assert main(command(place, output, "--trigger", "inc=INK", "--weight", "oil=none")) == 2
    said = capsys.readouterr().err
    assert "did you mean 'ink'" in said
    assert "--weight oil=none: is no number" in said
    assert main(command(place, output, "training.stepps=3")) == 2
    assert "unknown key" in capsys.readouterr().err
    against = ["student.lora=null", "student.lora.rank=30", "training.max_steps=7", "sources.base.guidance_scale=2"]
    for change, key, option in zip(
        against,
        ("student.lora.rank", "student.lora.rank", "training.max_steps", "sources"),
        ("--rank", "--rank", "--steps", "the LoRAs, --weight and --guidance-scale"),
        strict=True,
    ):
        assert main(command(place, output, change)) == 2
        said = capsys.readouterr().err
        assert f"{change}: {key} is given by {option}; leave the change out" in said
    assert main(command(place, output, "capabilities.ink.student_guidance_scale=2", "capabilities.ink.weight=0.9")) == 2
    said = capsys.readouterr().err
    assert "capabilities.ink.student_guidance_scale=2: capabilities.ink.student_guidance_scale is given by" in said
    assert "weight" not in said
    assert main(command(place, output, "--dry-run", "capabilities.ink.weight=1.3")) == 0
    assert "65 % of the samples: 8 prompts to ink" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_names_prompts_that_are_cut(place, tmp_path, capsys):
    (tmp_path / "long.txt").write_text(f"a cup\n{'a boat and ' * 60}a car\n")
    line = command(place, tmp_path / "out.safetensors", "--dry-run", "--prompts", str(tmp_path / "long.txt"))
    assert main(line) == 0
    said = re.findall(r"warning: of (\d+) prompts (\d+) are longer than the \d+ tokens of \w+", capsys.readouterr().err)
    assert said
    assert {cut for _, cut in said} == {"4"}  # the one as it is, with each trigger, and with both


def test_the_average_is_the_mean_of_what_they_add(place):
    transformer = empty_transformer(place / "model")
    loras = [far_lora(transformer, 1), far_lora(transformer, 5, rank=3, targets=["to_q"])]
    for name, (a, b, scale) in average(loras).items():
        expected = sum(s * y @ x for x, y, s in (lora[name] for lora in loras if name in lora)) / 2
        torch.testing.assert_close(scale * b @ a, expected)


@pytest.mark.parametrize(
    ("means", "patience", "ends"),
    [
        ([0.1, 0.2], 2, False),
        ([0.1, 0.2, 0.2], 2, False),
        ([0.1, 0.2, 0.2, 0.2 + GROWTH / 2], 2, True),
        ([0.1, 0.2, 0.2, 0.2 + 2 * GROWTH], 2, False),
        ([0.5, 0.4, 0.3], 2, True),
        ([0.5, 0.4, 0.3], 0, False),
    ],
)
def test_it_ends_where_nothing_grows(means, patience, ends):
    config = load_config(DEMO, ["training.warmup_steps=0", "training.max_steps=20"])
    a, b = config.capabilities
    scores = [(i, 20, {a: x + 0.1, b: x - 0.1}) for i, x in enumerate(means)]
    assert settled(scores, patience, config) is ends


def test_what_does_not_grow_counts_after_the_warm_up_and_since_the_steps_were_raised():
    config = load_config(DEMO, ["training.warmup_steps=3", "training.max_steps=20"])
    scores = [(i, 20, dict.fromkeys(config.capabilities, 0.5)) for i in range(5)]
    assert not settled(scores[:4], 2, config)  # at steps 2 and 3
    assert settled(scores, 2, config)
    more = load_config(DEMO, ["training.warmup_steps=3", "training.max_steps=30"])
    assert not settled(scores, 2, more)
    scores += [(i, 30, scores[0][2]) for i in (5, 6)]
    assert not settled(scores[:-1], 2, more)
    assert settled(scores, 2, more)


def test_the_mean_is_by_what_is_sampled_and_no_column_rules_it():
    weights = {"ink": 0.4, "oil": 0.4, "ink + oil": 0.2}
    assert mean_share({"ink": 0.5, "oil": 1.0, "ink + oil": 0.0}, weights) == pytest.approx(0.6)
    assert mean_share({"ink": 0.5, "oil": 0.5, "ink + oil": -6.3}, weights) == pytest.approx(0.2)
    config = load_config(DEMO, ["training.warmup_steps=0", "training.max_steps=20"])
    a, b = config.capabilities
    scores = [(i, 20, {a: x, b: y}) for i, (x, y) in enumerate([(0.1, -2.0), (0.3, -5.0), (0.3, -1.1)])]
    assert not settled(scores[:2], 1, config)
    assert settled(scores, 1, config)


def results(average: dict, best: dict, ours: dict) -> Results:
    shares = {BASE: dict.fromkeys(ours, 0.0), AVERAGE: average, "PEFT's ties at 0.8": best, MERGED: ours}
    found = Results(list(ours), {}, shares, "PEFT's ties at 0.8", dict.fromkeys(ours, 1.0), dict.fromkeys(ours, 4))
    judge(found)
    return found


def test_the_verdict():
    worse = results({"ink": 0.5, "oil": 0.5}, {"ink": 0.6, "oil": 0.6}, {"ink": 0.7, "oil": 0.2})
    assert not worse.better
    assert worse.verdict.startswith("WORSE than the plain average: this merge closes 45 % of the gaps")
    assert "--steps" in worse.advice
    enough = results({"ink": 0.5, "oil": 0.5}, {"ink": 0.9, "oil": 0.9}, {"ink": 0.9, "oil": 0.9})
    assert enough.better
    assert "a plain merge is enough" in enough.verdict
    better = results({"ink": 0.5, "oil": 0.5}, {"ink": 0.6, "oil": 0.6}, {"ink": 0.9, "oil": 0.4})
    assert better.better
    assert better.verdict.startswith("Better than any plain merge")
    assert better.headline == "better than any plain merge that was tried"
    assert worse.headline == "WORSE than the plain average"
    assert enough.headline == "no better than PEFT's ties at 0.8, which needs no training"
    assert "On oil the plain average is nearer" in better.verdict
    assert [one.enough for one in (worse, enough, better)] == [True, True, False]


def test_a_failed_training_is_not_called_fine():
    far = results({"ink": 0.2, "oil": 0.2}, {"ink": 0.6, "oil": 0.6}, {"ink": 0.3, "oil": 0.3})
    assert not far.better
    assert far.verdict.startswith("FAR BELOW PEFT's ties at 0.8, which needs no training: this merge closes 30 %")
    assert "Train longer" in far.advice
    assert "Or take PEFT's ties at 0.8. It lies beside the result" in far.advice
    base = results({"ink": -1.0, "oil": -1.0}, {"ink": -0.5, "oil": -0.5}, {"ink": -0.5, "oil": -0.6})
    assert not base.better
    assert not base.enough  # PEFT's best is below the base too
    assert base.verdict.startswith("WORSE than the base: this merge closes -55 %")
    assert "peft" not in base.advice
    assert not results({"ink": 0.2}, {"ink": 0.3}, {"ink": float("nan")}).better


def test_shares_of_the_gap():
    routes = [Route(PLAIN, (), [], 1), Route("ink", ("ink",), [], 1), Route("oil", ("oil",), [], 1)]
    errors = {
        BASE: {PLAIN: 0.0, "ink": 4.0, "oil": 2.0},
        "ink": {PLAIN: 3.0, "ink": 0.0, "oil": 5.0},
        "oil": {PLAIN: 1.0, "ink": 6.0, "oil": 0.0},
        MERGED: {PLAIN: 1.0, "ink": 1.0, "oil": 1.0},
    }
    assert shares_of(errors, routes)[MERGED] == {PLAIN: 0.5, "ink": 0.75, "oil": 0.5}
    assert shares_of(errors, routes)["ink"]["oil"] == -1.5
