"""Sources made of others, in runs: what they answer, in how many evaluations, and what is said where texts lack."""

import json
import re
import shlex

import pytest
import torch
import yaml
from model_runs import EDITING, FAMILIES, MORE, config_of
from world_runs import config_of as world_config

from danceopd.api import builder_of, distill, examiner_of
from danceopd.cli.parser import main
from danceopd.core.fields import Answers, routed
from danceopd.core.operators import projected, rescaled, zero_star
from danceopd.data.prepared import PreparedData
from danceopd.data.sampler import draw_batch
from danceopd.models.backbones import backbone_of
from danceopd.models.blocks import main_blocks, without_blocks
from danceopd.models.shared_base import SharedBase
from danceopd.planning.dry_run import dry_run
from danceopd.support.errors import UserError
from danceopd.training.assembly.build import build_model
from danceopd.training.loop import Trainer
from danceopd.world.build import build
from danceopd.world.evaluate import contestants, evaluate_run
from danceopd.world.sampling import make_conditioning
from danceopd.world.tokenizer import tokenize

SOURCES = {
    "strong": {"guided": {"source": "one", "scale": 4.0, "negative": "blurry", "interval": [0.3, 0.9]}},
    "star": {"guided": {"source": "one", "scale": 4.0, "zero_star": True, "rescale": 0.5}},
    "apg": {"guided": {"source": "two", "scale": 4.0, "apg": {"eta": 0.5, "norm": 3.0}}},
    "skip": {"guided": {"source": "one", "scale": 1.0, "skip_layers": {"layers": [0], "scale": 2.0}}},
    "auto": {"autoguided": {"source": "one", "weak": "two", "scale": 2.0}},
    "more": {"difference": {"base": "one", "source": "two", "weight": 1.5}},
    "both": {"compose": {"base": "one", "sources": {"two": 0.8, "strong": 0.5}}},
    "warm": {"slider": {"source": "two", "positive": "{prompt}, warm", "negative": "{prompt}, cold", "eta": 2.0}},
    "mean": {"mean": ["one", "two", "strong"]},
    "split": {"by_sigma": {"above": "two", "below": "warm", "sigma": 0.5}},
    "ink": {"teacher_at": {"source": "strong", "prompt": "in ink, {prompt}"}},
}


def plain(cond, uncond, scale):
    return uncond + scale * (cond - uncond)


def by_hand(name: str, ask, sigma, guide=plain):
    """The velocity of each source of SOURCES; ask(network, text=None) gives a network's, at another text."""

    def inside(low, high, yes, no):
        return torch.where(((sigma >= low) & (sigma <= high)).view(-1, 1, 1, 1), yes, no)

    def strong(text=None):
        v, u = ask("one", text), ask("one", "blurry")
        return inside(0.3, 0.9, guide(v, u, 4.0), v)

    def warm():
        return ask("two") + 2 * (ask("two", "{prompt}, warm") - ask("two", "{prompt}, cold"))

    one, two = ask("one"), ask("two")
    return {
        "one": lambda: one,
        "strong": strong,
        "star": lambda: rescaled(zero_star(one, ask("one", ""), 4.0), one, 0.5),
        "apg": lambda: projected(two, ask("two", ""), 4.0, 0.5, 3.0),
        "skip": lambda: one + 2 * (one - ask("skipped")),
        "auto": lambda: two + 2 * (one - two),
        "more": lambda: one + 1.5 * (two - one),
        "both": lambda: one + 0.8 * (two - one) + 0.5 * (strong() - one),
        "warm": warm,
        "mean": lambda: (one + two + strong()) / 3,
        "split": lambda: inside(0.5, 1, two, warm()),
        "ink": lambda: strong("in ink, {prompt}"),
    }[name]()


def with_operators(raw: dict, **changes) -> dict:
    """A run on all of them, each with a capability of its own."""
    data = {"world": "t2i", "size": 50}
    own = {name: {"source": name, "task": "t2i", "data": data} for name in ("one", *SOURCES)}
    return {**raw, "sources": {**raw["sources"], **SOURCES}, "capabilities": own, **changes}


# ------------------------------------------------------------------------------------------------ the picture world


def test_every_operator_of_the_world_answers_its_equation(raw):
    config = world_config(with_operators(raw), batch_size=64)
    parts = build(config)
    batch = draw_batch(parts.samples, [1.0] * len(config.capabilities), 64, 0, 0, in_turn=True)
    sigma = torch.linspace(1, 0.05, 64)
    names = list(config.capabilities)
    one, two = (parts.fields[names.index(name)] for name in ("one", "warm"))
    networks = {"one": one.network, "two": two.atoms[0].field.network}
    calls = []
    hooks = [n.register_forward_hook(lambda n, *_: calls.append(n)) for n in networks.values()]
    answers = routed(parts.fields, batch.route, batch.noise, sigma, batch.conditioning)
    assert sorted(map(id, calls)) == sorted(map(id, [one.network, one.network, networks["two"]]))  # one without a block
    for hook in hooks:
        hook.remove()
    for m, name in enumerate(config.capabilities):
        own = (batch.route == m).nonzero()[:, 0]
        c = batch.conditioning[own]

        def ask(network, text=None, own=own, c=c):
            said = c if text is None else c.with_text(text, tokenize([text], 10)[0], torch.arange(len(own)))
            field = networks.get(network) or without_blocks(networks["one"], networks["one"], [0])
            with torch.no_grad():
                return field(batch.noise[own], sigma[own], said)

        torch.testing.assert_close(answers.target()[own], by_hand(name, ask, sigma[own]), rtol=1e-4, atol=1e-4)


def test_the_run_counts_what_the_plan_counts(raw):
    config = world_config(with_operators(raw), batch_size=64, max_steps=6)
    trainer = Trainer(config, build(config))
    for _ in range(6):
        trainer.update()
    plan = dry_run(config, examiner_of(config))
    assert not plan.problems
    assert trainer.evaluations["sources"] / 6 == pytest.approx(plan.evaluations["source"], rel=0.08)


def test_two_terms_go_into_the_loss_unwritten(raw, monkeypatch):
    """Guidance, autoguidance and a difference: the loss reads rows of the two networks' forwards, and nothing else."""
    written = []
    monkeypatch.setattr(Answers, "target", lambda self: written.append(self))
    names = ["strong", "auto", "more", "ink"]
    raw = with_operators(raw)
    raw["capabilities"] = {name: raw["capabilities"][name] for name in names}
    config = world_config(raw, batch_size=32)
    trainer = Trainer(config, build(config))
    questions = trainer.ask(trainer.draw())["student"]
    answers = questions.answers
    assert len({id(v) for v in (*answers.velocities, *answers.unconds)}) == 2
    assert sum(len(v) for v in {id(v): v for v in answers.velocities}.values()) >= 32
    trainer.update()
    assert not written


def test_soft_routing_asks_every_source_with_its_texts(raw):
    config = world_config(with_operators(raw, options={"routing": "soft"}))
    trainer = Trainer(config, build(config))
    record = trainer.update()
    assert record["skipped"] == 0


def test_a_prompt_that_is_left_out_leaves_out_what_is_made_of_it(raw):
    own = {"source": "ink", "task": "t2i", "data": {"world": "t2i", "size": 20}, "prompt_dropout": 0.5}
    config = world_config({**with_operators(raw), "capabilities": {"ink": own}})
    parts = build(config)
    batch = draw_batch(parts.samples, [1.0], 40, 0, 0, prompt_dropout=[0.5])
    empty = tokenize([""], 10)[0]
    left_out = (batch.conditioning.prompt == empty).all(1)
    assert 5 < left_out.sum() < 35
    said = batch.conditioning.texts["in ink, {prompt}"]
    assert torch.equal((said == empty).all(1), left_out)


def test_texts_take_columns_of_a_manifest(raw, tmp_path):
    rows = [{"id": str(i), "task": "t2i", "prompt": f"a {i}", "long": f"a long picture of {i}"} for i in range(4)]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"teacher_at": {"source": "one", "prompt": "{long}"}}
    own = {"source": "long", "task": "t2i", "data": {"manifest": str(manifest)}}
    raw = {**raw, "sources": {**raw["sources"], "long": source}, "capabilities": {"t2i": own}}
    config = world_config(raw)
    parts = build(config)
    c = parts.samples.condition(parts.samples.groups[0].data[0], [2, 0], [False, False])
    assert torch.equal(c.texts["{long}"], tokenize(["a long picture of 2", "a long picture of 0"], 10))
    del rows[1]["long"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    says = "capabilities.t2i.data: no 'long', which the text '{long}' takes from every row"
    assert says in dry_run(config, examiner_of(config)).problems
    with pytest.raises(UserError) as error:
        build(config)
    assert says in str(error.value)


def test_a_block_that_is_not_there_is_named(raw):
    skip = {"guided": {"source": "one", "scale": 1.0, "skip_layers": {"layers": [3], "scale": 2.0}}}
    raw = {**raw, "sources": {**raw["sources"], "skip": skip}}
    raw["capabilities"] = {"t2i": {**raw["capabilities"]["t2i"], "source": "skip"}}
    says = "DiT has 1 blocks, counted from 0, and no 3"
    assert any(says in problem for problem in dry_run(world_config(raw), examiner_of(world_config(raw))).problems)
    with pytest.raises(UserError, match=says):
        build(world_config(raw))


def test_a_run_on_operators_is_drawn_and_reported(raw):
    raw = with_operators(raw)
    raw["capabilities"] = {name: raw["capabilities"][name] for name in ("one", "warm", "ink")}
    config = world_config(raw, max_steps=2, sample_every=2)
    folder = distill(config)
    assert (folder / "samples" / "step-00000002.png").exists()
    student = build(config).student
    fields = contestants(config, student)
    assert [name for name in fields if name.startswith("source_")] == [f"source_{name}" for name in config.sources]
    x = torch.randn(2, 3, 32, 32), torch.tensor([0.9, 0.2])
    texts = {text: [text.format(prompt="a cup")] * 2 for text in fields["source_ink"].texts()}
    velocity = fields["source_ink"](*x, make_conditioning(["a cup"] * 2, None, 10, texts))
    assert velocity.shape == x[0].shape
    evaluation = config.evaluation.model_copy(update={"per_task": 1, "per_kind": 1})
    written = config.model_copy(update={"evaluation": evaluation})
    (folder / "config.yaml").write_text(yaml.safe_dump(written.to_dict()))
    results = evaluate_run(folder)
    assert {"source_warm", "source_split"} <= {row["name"] for row in results["rows"]}


# ------------------------------------------------------------------------------------------------ diffusers' models


def model_config(root, cache, output_dir, **changes):
    sources = {name: {"lora": [{"path": str(root / name)}]} for name in ("one", "two")} | SOURCES
    data = {"prepared": str(cache / "rows.jsonl")}
    task, rows = ("edit", "two") if changes.pop("edit", False) else ("t2i", "one")
    own = {name: {"source": name, "task": task, "capability": rows, "data": data} for name in ("one", *SOURCES)}
    return config_of(
        root,
        sources=sources,
        capabilities=own,
        **{"training.output_dir": str(output_dir), "training.batch_size": 24, **changes},
    )


def prepare(root, cache, texts=()):
    words = ["data", "prepare", str(root / "rows.jsonl"), "--model", str(root / "model"), "--cache", str(cache)]
    words += ["--resolution", "32", "--dtype", "float32"]
    assert main([*words, *(["--texts", *texts] if texts else [])]) == 0


TEXTS = ["blurry", "{prompt}, warm", "{prompt}, cold", "in ink, {prompt}"]


@pytest.mark.parametrize("family", ["sd3", "qwen", "z", "qwen_edit", "z_omni"])
def test_every_operator_of_a_model_answers_its_equation(prepared_places, family, tmp_path):
    """By the model itself, asked with encodings of each row's own texts; the texts are prepared as the run says."""
    root, cache = prepared_places(family), tmp_path / "cache"
    prepare(root, cache)
    edits = family in EDITING
    config = model_config(root, cache, tmp_path / "run", edit=edits)
    with pytest.raises(UserError) as error:
        build_model(config)
    said = str(error.value)
    assert "no encoding of 'blurry'" in said
    [command] = re.findall(r"^ +(danceopd data prepare .*)$", said, re.MULTILINE)
    assert main(shlex.split(command)[1:]) == 0
    parts = build_model(config)
    batch = draw_batch(parts.samples, [1.0] * len(config.capabilities), 24, 0, 0, in_turn=True)
    sigma = torch.linspace(1, 0.05, 24)
    shared, asked = parts.fields[0].network, []
    hook = shared.transformer.register_forward_hook(lambda *_: asked.append(1))
    answers = routed(parts.fields, batch.route, batch.noise, sigma, batch.conditioning)
    hook.remove()
    if not family.startswith(("qwen", "z")):  # these take prompts of several lengths in several forwards
        assert len(asked) == 2  # all terms of all sources, and one without a block
    for m, name in enumerate(config.capabilities):
        own = (batch.route == m).nonzero()[:, 0]
        c = batch.conditioning[own]

        def ask(network, text=None, own=own, c=c):
            rows = parts.samples.groups[0].data[0]
            said = c if text is None else c.with_text(text, rows.encoded(text), torch.arange(len(own)))
            adapter = torch.full((len(own),), int(network == "two"))
            field = lambda *x: shared(*x, adapter)  # noqa: E731
            if network == "skipped":
                field = without_blocks(field, shared.transformer, [0])
            with torch.no_grad():
                return field(batch.noise[own], sigma[own], said)

        expected = by_hand(name, ask, sigma[own], parts.combine or plain)
        torch.testing.assert_close(answers.target()[own], expected, rtol=2e-3, atol=2e-3)


def test_texts_are_encoded_as_the_rows_fill_them_in(prepared_places, tmp_path):
    root, cache = prepared_places("sd3"), tmp_path / "cache"
    prepare(root, cache, TEXTS)
    parts = build_model(model_config(root, cache, tmp_path / "run"))
    rows = parts.samples.groups[0].data[list(SOURCES).index("warm") + 1]
    c = rows.condition([1, 2], [False, True])
    encode = backbone_of(root / "model").text_encoder(root / "model")
    prompts = [json.loads(line)["prompt"] for line in (root / "rows.jsonl").read_text().splitlines()]
    ours = [prompt for i, prompt in enumerate(prompts) if i % 2 == 0]
    expected = encode([f"{ours[1].strip()}, warm", ""])
    for name, value in c.texts["{prompt}, warm"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    for name, value in rows.encoded("blurry").items():
        torch.testing.assert_close(value, encode(["blurry"])[name][0], rtol=1e-5, atol=1e-5)
    assert "blurry" not in c.texts  # the source has it


def test_a_row_without_a_column_is_left_out_and_braces_are_checked(prepared_places, tmp_path, capsys):
    root = prepared_places("sd3")
    words = ["data", "prepare", str(root / "rows.jsonl"), "--model", str(root / "model"), "--cache", str(tmp_path)]
    assert main([*words, "--resolution", "32", "--texts", "{long}"]) == 2
    assert "no 'long', which the text '{long}' takes from every row" in capsys.readouterr().err
    assert main([*words, "--resolution", "32", "--texts", "{prompt"]) == 2
    assert "a brace itself is doubled" in capsys.readouterr().err


@pytest.mark.parametrize("family", sorted([*FAMILIES, "z_omni"]))
def test_a_network_without_a_block_is_one_of_fewer_blocks(prepared_places, places, family):
    root = prepared_places(family) if family in MORE else places(family)
    backbone = backbone_of(root / "model")
    whole = backbone.load_transformer(root / "model")
    config = (root / "cache" / "rows.jsonl").read_text().splitlines()
    capability = json.loads(config[1])["capability"]
    rows = PreparedData(root / "cache" / "rows.jsonl", capability)
    c = rows.condition([0, 1], [False, False])
    shape = backbone.latent_shape(root / "model", *rows.rows[0]["size"])
    latents, sigma = torch.randn(2, *shape), torch.tensor([0.9, 0.3])
    field = SharedBase(whole, [], backbone.velocity).field(-1)
    c = c.embedding(3.5 if getattr(whole.config, "guidance_embeds", False) else None)
    with torch.no_grad():
        before = field(latents, sigma, c)
        without = without_blocks(field, whole, [0])(latents, sigma, c)
        torch.testing.assert_close(field(latents, sigma, c), before)
        blocks = main_blocks(whole, [0])
        del blocks[0]
        if len(blocks):
            torch.testing.assert_close(without, field(latents, sigma, c))
    assert (without - before).norm() > 1e-3 * before.norm()
    with pytest.raises(UserError, match=r"counted from 0, and no 99"):
        main_blocks(whole, [99])


def test_a_run_on_operators_of_a_model_counts_what_its_plan_counts(prepared_places, tmp_path):
    root = prepared_places("sd3")
    prepare(root, tmp_path / "cache", TEXTS)
    config = model_config(root, tmp_path / "cache", tmp_path / "run")
    plan = dry_run(config, examiner_of(config))
    assert not plan.problems
    trainer = Trainer(config, builder_of(config)(config))
    for _ in range(8):
        assert trainer.update()["skipped"] == 0
    assert trainer.evaluations["sources"] / 8 == pytest.approx(plan.evaluations["source"], rel=0.08)
