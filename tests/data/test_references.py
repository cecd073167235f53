"""Rows with several source pictures, mixed in batches of one kind; rows no batch can have; rows of other encoders."""

import json
import math
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import tiny_flux
import tiny_flux2
import tiny_qwen_image
import tiny_sd3
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from danceopd.api import distill
from danceopd.config.reading import parse_config
from danceopd.data.cache import Cache, key_of
from danceopd.data.prepare import fit, prepare
from danceopd.data.prepared import PreparedData, mix
from danceopd.models.backbones import backbone_of, qwen_image
from danceopd.planning.dry_run import dry_run
from danceopd.planning.models import examine
from danceopd.support.errors import UserError
from danceopd.training.assembly.build import build_model

SIZE = (64, 64)  # pixels, of the pictures' buckets
WIDE, TALL = (48, 80), (80, 48)


def write_manifest(folder, rows):
    """Rows, and the pictures that they name: a square one, a wide one and a tall one."""
    rng = np.random.default_rng(0)
    for name, (width, height) in (("square", (70, 70)), ("wide", (70, 42)), ("tall", (30, 50))):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"picture {i}", **row}) + "\n" for i, row in enumerate(rows)))
    return path


def row(task, *sources, target=None):
    pictures = {"source_image": [f"{name}.png" for name in sources]} if sources else {}
    return {"task": task, **pictures, **({"target_image": f"{target}.png"} if target else {})}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny FLUX.2 klein; rows of drawing and of editing with one and two references, two of sizes of their own."""
    root = tmp_path_factory.mktemp("references")
    model = tiny_flux2.save_tiny(root / "model")
    sources = [["square"], ["square", "wide"], ["square", "wide"], ["wide", "square"]]
    rows = [row("t2i")] * 3 + [row("edit", *names, target="square") for names in sources]
    manifest = write_manifest(root, [*rows, row("t2i", target="wide"), row("edit", "square", target="tall")])
    done = prepare(manifest, model, root / "cache", resolution=64)
    assert (done.rows, done.problems) == (9, [])
    return root


def config_of(root, folder, **changes):
    data = {"prepared": str(root / "cache" / "rows.jsonl")}
    raw = {
        "model": str(root / "model"),
        "student": {"lora": {"rank": 2}},
        "sources": {"base": {"guidance_scale": 3.0}},  # another than the student begins as
        "capabilities": {name: {"source": "base", "task": name, "data": data} for name in ("t2i", "edit")},
        "rollout": {"num_inference_steps": 3},
        "training": {"output_dir": str(folder), "max_steps": 6, "batch_size": 4, "log_every": 1, "sample_every": 0},
    }
    return parse_config(raw, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def test_rows_of_one_and_two_references_train_in_batches_of_one_kind(place, tmp_path, capsys):
    config = config_of(place, tmp_path / "run")
    samples = build_model(config).samples
    square, wide = (16, 4, 4), (16, 3, 5)
    assert {group.source_shapes: ([len(data) for data in group.data], group.rows) for group in samples.groups} == {
        (square,): ([3, 1], 1 + 3 / 4),
        (square, wide): ([3, 2], 2 + 3 / 2),
        (wide, square): ([3, 1], 1 + 3 / 4),
    }
    folder = distill(config)
    out = capsys.readouterr().out
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 6
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert {"t2i", "edit"} in [set(record["loss_by_capability"]) for record in records if "loss" in record]
    found = dry_run(config, examine).found
    assert "t2i: 3 rows" in " ".join(found)
    assert "edit: 4 rows" in " ".join(found)
    for line in (
        "1 of 4 rows of t2i are never drawn: no rows of edit have their size",
        "1 of 5 rows of edit are never drawn: no rows of t2i have their size",
    ):
        assert line in found
        assert f"warning: {line}\n" in out


def test_two_references_are_encoded_and_in_their_order(place):
    edit = PreparedData(place / "cache" / "rows.jsonl", "edit")
    encode = backbone_of(place / "model").picture_codec(place / "model")[0]
    part = edit.part((SIZE, (WIDE, SIZE)))
    sources = part.condition([0], [False]).source
    for latents, name, size in zip(sources, ("wide", "square"), (WIDE, SIZE), strict=True):
        expected = encode(fit(Image.open(place / f"{name}.png"), size)[None])
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_a_text_encoder_that_sees_pictures_sees_all_of_a_row(tmp_path):
    model = tiny_qwen_image.save_tiny(tmp_path / "model", edit=True)
    rows = [row("edit", "square"), row("edit", "square", "wide"), row("edit", "wide", "square"), row("t2i")]
    manifest = write_manifest(tmp_path, [{**each, "prompt": "join them"} for each in rows])
    done = prepare(manifest, model, tmp_path / "cache", resolution=64)
    assert done.problems == []
    # Of each row the prompt and the empty one with its pictures; a t2i row's empty one is the negative prompt itself.
    assert done.made == 8 + 2
    encode = qwen_image.text_encoder(model)
    shown = {name: fit(Image.open(tmp_path / f"{name}.png"), size) for name, size in (("square", SIZE), ("wide", WIDE))}
    edit = PreparedData(done.path, "edit")
    for index, names in enumerate((["square"], ["square", "wide"], ["wide", "square"])):
        conditioning = edit.condition([index], [False])
        for encoded, prompt in ((conditioning.prompt, "join them"), (conditioning.empty_prompt, "")):
            wanted = encode([prompt], [[shown[name] for name in names]])["prompt_embeds"]
            embeds, mask = encoded["prompt_embeds"], encoded["prompt_mask"]
            assert mask.sum() == wanted.shape[1]
            torch.testing.assert_close(embeds[:, : wanted.shape[1]], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("save", "most", "said"),
    [
        (
            tiny_sd3.save_tiny,
            0,
            ["1 source picture, but a StableDiffusion3Pipeline takes none", "2 source pictures, but"],
        ),
        (tiny_flux.save_tiny, 1, ["2 source pictures, but a FluxKontextPipeline takes 1"]),
        (
            lambda folder: tiny_flux.save_tiny(folder, pipeline="FluxPipeline"),
            0,
            ["1 source pic", "a FluxPipeline takes"],
        ),
    ],
)
def test_more_references_than_the_model_takes_are_a_rows_problem(tmp_path, save, most, said):
    model = save(tmp_path / "model")
    manifest = write_manifest(tmp_path, [row("t2i"), row("edit", "square"), row("edit", "square", "wide")])
    done = prepare(manifest, model, tmp_path / "cache", resolution=64)
    assert done.rows == 1 + most
    assert [problem.line for problem in done.problems] == [2, 3][most:]
    for problem, words in zip(done.problems, said, strict=True):
        assert words in str(problem)
    with pytest.raises(UserError, match="line 3: 2 source pictures"):
        prepare(manifest, model, tmp_path / "cache", resolution=64, on_bad_row="refuse")


# ------------------------------------------------------------------------------------------- encoders compared


def copied(place, tmp_path, seed=None):
    """The model's folder copied, or made of other weights, and a configuration for it."""
    if seed is None:
        shutil.copytree(place / "model", tmp_path / "model")
    else:
        tiny_flux2.save_tiny(tmp_path / "model", seed=seed)
    raw = config_of(place, tmp_path / "run").to_dict()
    return tmp_path / "model", parse_config(raw | {"model": str(tmp_path / "model")})


def test_rows_of_other_encoders_are_refused(place, tmp_path):
    model, config = copied(place, tmp_path, seed=1)
    said = rf"edit\.data\.prepared: .* another text_encoder and vae than {model} .*prepare` again with --model {model}"
    with pytest.raises(UserError, match=said):
        build_model(config)
    assert any(re.search(said, problem) for problem in dry_run(config, examine).problems)
    shutil.rmtree(model / "text_encoder")
    with pytest.raises(UserError, match="another vae than"):
        build_model(config)


def test_only_encoders_that_are_there_are_compared(place, tmp_path):
    model, config = copied(place, tmp_path)  # in another place they are the same
    build_model(config)
    for path in (model / "text_encoder").glob("*.safetensors"):
        path.unlink()  # its configuration stays
    shutil.rmtree(model / "tokenizer")
    build_model(config)
    for path in (model / "vae").glob("*.safetensors"):
        path.unlink()
    build_model(config)
    assert dry_run(config, examine).problems == []


# --------------------------------------------------------------------------------------------- which rows mix


def prepared_of(folder, kinds):
    """{capability: the kinds of its rows} as prepared data; all pictures are one entry."""
    cache, entry = Cache(folder), key_of("entry")
    if entry not in cache:
        cache.write({entry: {"latents": torch.zeros(1)}})
    lines = [{"model": "m", "negative_prompts": {"": entry}}]
    for name, each in kinds.items():
        for size, sources in each:
            named = {"id": str(len(lines)), "capability": name, "prompt": entry, "target": None}
            lines.append(named | {"size": size, "sources": [entry] * len(sources), "source_sizes": sources})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: PreparedData(path, name) for name in kinds}


A, B, C = (64, 64), (48, 80), (80, 48)


def test_a_group_counts_each_row_once_and_leaves_all_of_a_capability_equally_likely(tmp_path):
    data = prepared_of(
        tmp_path,
        {"t2i": [(A, ())] * 30 + [(B, ())] * 10, "edit": [(A, (A,))] * 20 + [(A, (A, B))] * 10 + [(B, (B,))] * 10},
    )
    mixing = mix(data)
    assert mixing.rows == pytest.approx({(A, (A,)): 20 + 20, (A, (A, B)): 10 + 10, (B, (B,)): 10 + 10})
    assert mixing.never_drawn == []


def test_rows_that_are_never_drawn_are_told_by_what_they_lack(tmp_path):
    kinds = {
        "t2i": [(A, ()), (A, ()), (B, ()), (C, ())],
        "edit": [(A, (A,)), (A, (B,)), (B, (A,)), (C, (A,))],
        "local": [(A, (A,)), (B, (B,)), (B, (B,))],
    }
    mixing = mix(prepared_of(tmp_path, kinds))
    assert mixing.rows == {(A, (A,)): 4}
    assert sorted(mixing.never_drawn) == [
        "1 of 4 rows of t2i are never drawn: no rows of local have their size",
        "1 of 4 rows of t2i are never drawn: the others have no sizes of source pictures in common there",
        "2 of 3 rows of local are never drawn: no rows of edit have their size and their sources'",
        "3 of 4 rows of edit are never drawn: no rows of local have their size and their sources'",
    ]
    del kinds["local"][0]
    said = r"common to all capabilities.*t2i has 64 x 64, 48 x 80, 80 x 48; edit has 64 x 64 from 64 x 64.*; local has"
    with pytest.raises(UserError, match=said):
        mix(prepared_of(tmp_path, kinds))


sizes = st.sampled_from([A, B, C])
drawing = st.lists(st.tuples(sizes, st.just(())), min_size=1, max_size=8)
editing = st.lists(st.tuples(sizes, st.lists(sizes, min_size=1, max_size=2).map(tuple)), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(st.lists(drawing | editing, min_size=1, max_size=3))
def test_groups_and_the_rows_left_out_are_all_rows(tmp_path_factory, lists):
    data = prepared_of(tmp_path_factory.mktemp("mix"), {str(m): kinds for m, kinds in enumerate(lists)})
    try:
        mixing = mix(data)
    except UserError:
        mixing = None
    reach = Counter()  # by the batches that can be put together at all: one row of each capability
    batches = [[]]
    for kinds in lists:
        batches = [[*batch, kind] for batch in batches for kind in set(kinds)]
    for batch in batches:
        alike = len({size for size, _ in batch}) == 1 and len({sources for _, sources in batch if sources}) <= 1
        if alike:
            reach.update(dict.fromkeys(enumerate(batch), 1))
    drawn = [sum((m, kind) in reach for kind in kinds) for m, kinds in enumerate(lists)]
    assert (mixing is None) == (not any(drawn))
    if mixing:
        assert sum(mixing.rows.values()) == pytest.approx(sum(drawn))
        left = Counter()
        for line in mixing.never_drawn:
            count, total, name = re.match(r"(\d+) of (\d+) rows of (\d) are never drawn: .", line).groups()
            assert int(total) == len(lists[int(name)])
            left[int(name)] += int(count)
        assert all(left[m] == len(kinds) - drawn[m] for m, kinds in enumerate(lists))
