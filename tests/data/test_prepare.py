"""Preparing a cache: encoded once, found again after a kill, mended where damaged; bad rows listed and left out."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny_flux2 import save_tiny

from danceopd.cli.parser import main
from danceopd.data import prepare as module
from danceopd.data.cache import Cache, checksum, key_of
from danceopd.data.prepare import bucket_of, buckets, fit, prepare
from danceopd.data.prepared import PreparedData, mix
from danceopd.models.backbones import flux2
from danceopd.models.fingerprint import fingerprint
from danceopd.support.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("flux2"))


@pytest.fixture
def manifest(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("wide", (96, 64)), ("tall", (64, 100)), ("same", (96, 64))):
        if name != "same":
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "same.png").write_bytes((tmp_path / "wide.png").read_bytes())
    rows = [
        {"id": "a", "task": "t2i", "prompt": "a red cup"},
        {"id": "b", "task": "edit", "prompt": "make it blue", "source_image": "wide.png", "target_image": "tall.png"},
        {"id": "c", "task": "edit", "prompt": "a red cup", "source_image": "same.png"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(manifest, model, tmp_path, **options):
    return prepare(manifest, model, tmp_path / "cache", **{"resolution": 64, "batch_size": 2, **options})


def records(prepared):
    head, *rows = map(json.loads, prepared.path.read_text().splitlines())
    return head, {row["id"]: row for row in rows}


def test_what_is_written_is_what_the_encoders_give(manifest, model, tmp_path):
    prepared = run(manifest, model, tmp_path)
    assert (prepared.rows, prepared.problems, prepared.damaged) == (3, [], [])
    head, rows = records(prepared)
    cache = Cache(tmp_path / "cache")
    # Two prompts and the empty one; equal prompts and equal pictures are one entry each.
    assert len(cache) == prepared.made == 5
    assert rows["a"]["prompt"] == rows["c"]["prompt"]
    assert rows["b"]["sources"] == rows["c"]["sources"]
    encode = flux2.text_encoder(model)
    for prompt, key in (("a red cup", rows["a"]["prompt"]), ("", head["negative_prompts"][""])):
        for name, value in encode([prompt]).items():
            torch.testing.assert_close(cache.read(key)[name], value[0], rtol=1e-5, atol=1e-5)
    size = tuple(rows["b"]["size"])
    assert size[0] > size[1]  # the target's, which is tall
    picture = fit(Image.open(tmp_path / "tall.png"), size)
    expected = flux2.picture_codec(model)[0](picture[None])[0]
    torch.testing.assert_close(cache.read(rows["b"]["target"])["latents"], expected, rtol=1e-4, atol=1e-4)
    assert expected.shape == flux2.latent_shape(model, *size)


def test_again_makes_nothing_and_needs_no_encoder(manifest, model, tmp_path, monkeypatch):
    first = run(manifest, model, tmp_path)
    monkeypatch.setattr(flux2, "text_encoder", lambda *_: 1 / 0)
    monkeypatch.setattr(flux2, "picture_codec", lambda *_: 1 / 0)
    again = run(manifest, model, tmp_path)
    assert (again.made, again.found) == (0, first.made)
    assert records(again) == records(first)


def test_a_stopped_preparation_goes_on(manifest, model, tmp_path, monkeypatch):
    calls = []
    original = flux2.picture_codec

    def stopping(*args):
        encode, decode = original(*args)

        def once(pictures):
            calls.append(len(pictures))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return encode(pictures)

        return once, decode

    monkeypatch.setattr(flux2, "picture_codec", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(manifest, model, tmp_path, entries_per_shard=1, batch_size=1)
    done = len(Cache(tmp_path / "cache"))
    assert done == 4  # the prompts and one picture
    assert run(manifest, model, tmp_path).made == 1


def test_damage_is_named_and_mended(manifest, model, tmp_path):
    first = run(manifest, model, tmp_path, entries_per_shard=1, batch_size=1)
    whole = Cache(tmp_path / "cache")
    wanted = {key: {name: t.clone() for name, t in whole.read(key).items()} for key in whole._where}
    shards = sorted((tmp_path / "cache").glob("*.safetensors"))
    data = bytearray(shards[0].read_bytes())
    data[-1] ^= 1
    shards[0].write_bytes(data)  # a bit of an entry
    shards[1].write_bytes(shards[1].read_bytes()[:40])  # the header
    broken = Cache(tmp_path / "cache")
    assert broken.damaged == [shards[1].name]
    (key,) = (key for key, (path, *_) in broken._where.items() if path == shards[0])
    with pytest.raises(UserError, match=r"checksum differs.*danceopd data prepare"):
        broken.read(key)
    again = run(manifest, model, tmp_path)
    assert again.made == 2
    assert set(again.damaged) == {shards[0].name, shards[1].name}
    assert first.made == 5
    for key, tensors in wanted.items():
        for name, value in Cache(tmp_path / "cache").read(key).items():
            torch.testing.assert_close(value, tensors[name], rtol=1e-4, atol=1e-5)


def test_bad_rows_are_listed_and_the_rest_goes_on(manifest, model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    more = [
        {"id": "d", "task": "edit", "prompt": "x", "source_image": "gone.png"},
        {"id": "e", "task": "edit", "prompt": "x", "source_image": "broken.png"},
        {"id": "f", "task": "t2i", "prompt": " "},
        {"id": "g", "task": "edit", "prompt": "x", "source_image": "../secret.png"},
    ]
    with manifest.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in more))
    prepared = run(manifest, model, tmp_path)
    assert prepared.rows == 3
    told = {problem.line: str(problem) for problem in prepared.problems}
    assert set(told) == {4, 5, 6, 7}
    for line, words in ((4, "not there"), (5, "broken.png: can't be decoded"), (6, "no prompt"), (7, "leads out")):
        assert words in told[line]
    with pytest.raises(UserError, match=r"line 4.*\n.*line 5.*\n.*line 6.*\n.*line 7"):
        run(manifest, model, tmp_path, on_bad_row="refuse")
    manifest.write_text(json.dumps(more[0]) + "\n")
    with pytest.raises(UserError, match=r"no row of .* can be used"):
        run(manifest, model, tmp_path)


def test_a_resolution_that_the_model_does_not_take(manifest, model, tmp_path):
    with pytest.raises(UserError, match="multiples of 16, got 2 x 2"):
        run(manifest, model, tmp_path, resolution=2)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"id": "1", "task": "t2i", "prompt": "a cup"}) + "\n")
    with pytest.raises(UserError, match="got 100 x 100"):  # rows without pictures are of this size exactly
        run(text, model, tmp_path, resolution=100)
    assert not (tmp_path / "cache").exists()


def test_other_weights_make_other_entries(manifest, model, tmp_path):
    first = run(manifest, model, tmp_path)
    other = run(manifest, save_tiny(tmp_path / "other", seed=1), tmp_path)
    assert other.made == first.made
    assert fingerprint(model / "vae") != fingerprint(tmp_path / "other" / "vae")
    moved = tmp_path / "moved"
    (tmp_path / "other").rename(moved)
    assert run(manifest, moved, tmp_path).made == 0


def test_a_model_that_is_not_one(manifest, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        run(manifest, tmp_path / "nowhere", tmp_path)
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Cache(tmp_path / "cache")


def test_buckets():
    sizes = buckets(1024, 16)
    assert (1024, 1024) in sizes
    assert all(h % 16 == w % 16 == 0 and 0.5 <= h / w <= 2 for h, w in sizes)
    assert all(abs(h * w / 1024**2 - 1) < 0.02 for h, w in sizes)
    assert bucket_of(1000, 1000, sizes) == (1024, 1024)
    h, w = bucket_of(720, 1280, sizes)
    assert h / w == pytest.approx(720 / 1280, rel=0.03)
    assert bucket_of(100, 1000, sizes) == min(sizes, key=lambda size: size[0] / size[1])


def test_fit_covers_and_keeps_the_middle():
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    tensor = fit(picture, (64, 64))
    assert tensor.shape == (3, 64, 64)
    assert tensor[2].mean() > 0.95
    assert tensor[0].mean() < -0.95


def test_keys_and_checksums_tell_things_apart():
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of("a") == key_of(b"a")
    x = torch.arange(6.0)
    sums = {checksum(t) for t in ({"x": x}, {"y": x}, {"x": x.view(2, 3)}, {"x": x.half()}, {"x": x + 1}, {})}
    assert len(sums) == 6


def test_step_of_sizes(model):
    assert module.multiple_of(flux2, model) == 16


def test_prepared_rows_condition_a_batch(manifest, model, tmp_path):
    prepared = run(manifest, model, tmp_path)
    cache = Cache(tmp_path / "cache")
    head, rows = records(prepared)
    edit = PreparedData(prepared.path, "edit")
    assert len(edit) == 2
    assert edit.has_source
    wide_size, tall_size = (tuple(rows[name]["size"]) for name in ("c", "b"))
    assert edit.kinds == {(tall_size, (wide_size,)): 1, (wide_size, (wide_size,)): 1}
    assert edit.targets([0]) is None  # one of the rows has none
    wide = edit.part((wide_size, (wide_size,)))
    assert len(wide) == 1
    c = wide.condition([0, 0], [False, True])
    for name, value in cache.read(rows["c"]["prompt"]).items():
        assert c.prompt[name][0].equal(value)
    for name, value in cache.read(head["negative_prompts"][""]).items():
        assert c.prompt[name][1].equal(value)
        assert wide.empty_prompt()[name].equal(value)
    assert c.source[0][1].equal(cache.read(rows["c"]["sources"][0])["latents"])
    assert c.has_source.all()
    t2i = PreparedData(prepared.path, "t2i")
    assert not t2i.has_source
    assert t2i.condition([0], [False]).source is None
    with pytest.raises(UserError, match=r"no picture size is common.*t2i has 64 x 64; edit has"):
        mix({"t2i": t2i, "edit": edit})
    assert mix({"t2i": t2i, "again": t2i}).rows == {((64, 64), ()): 2}


def test_prepared_rows_that_cannot_be_used(manifest, model, tmp_path):
    prepared = run(manifest, model, tmp_path)
    with pytest.raises(UserError, match=r"no rows of 'edti'.*did you mean 'edit'.*capability: NAME"):
        PreparedData(prepared.path, "edti")
    with pytest.raises(UserError, match="no prepared rows"):
        PreparedData(tmp_path / "rows.json", "edit")
    lines = prepared.path.read_text().splitlines()
    record = {**json.loads(lines[2]), "sources": [], "source_sizes": []}
    prepared.path.write_text("\n".join([*lines, json.dumps(record)]))
    with pytest.raises(UserError, match=r"1 of 3 rows of 'edit' have no source picture"):
        PreparedData(prepared.path, "edit")
    record = {key: value for key, value in json.loads(lines[2]).items() if key != "source_sizes"}
    prepared.path.write_text("\n".join([*lines, json.dumps(record)]))
    with pytest.raises(UserError, match=r"of an older version \(row b has 1 sources of 0 sizes\)"):
        PreparedData(prepared.path, "edit")
    prepared.path.write_text("\n".join([*lines, "{"]))
    with pytest.raises(UserError, match="is damaged"):
        PreparedData(prepared.path, "edit")
    prepared.path.write_text("\n".join(lines))
    next((tmp_path / "cache").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="are not in the cache"):
        PreparedData(prepared.path, "edit")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overflowing(encode, fails):
    """An encoder that for some prompts gives a value that is not finite, as in half precision, or raises an error."""

    def encoded(prompts, pictures=None):
        if any(fails(prompt) is not None and isinstance(fails(prompt), Exception) for prompt in prompts):
            raise next(fails(p) for p in prompts if isinstance(fails(p), Exception))
        found = encode(prompts, pictures)
        for i, prompt in enumerate(prompts):
            if fails(prompt) is not None:
                found["prompt_embeds"][i, 3, 1] = fails(prompt)
        return found

    return encoded


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (float("nan"), "has values that are not finite, in prompt_embeds"),
        (float("-inf"), "has values that are not finite, in prompt_embeds"),
        (IndexError("index out of range in self"), r"the encoder refuses it \(index out of range in self\)"),
        (ValueError(""), r"the encoder refuses it \(ValueError\)"),
    ],
)
def test_a_row_that_cannot_be_encoded_is_left_out_by_name(model, tmp_path, monkeypatch, fault, said):
    texts = ["one", "two", "bad", "three", "four"]
    path = write_rows(tmp_path / "t.jsonl", [{"id": t, "task": "t2i", "prompt": t} for t in texts])
    original = flux2.text_encoder

    def encoder(*args):
        return overflowing(original(*args), lambda prompt: fault if prompt == "bad" else None)

    with monkeypatch.context() as patch:
        patch.setattr(flux2, "text_encoder", encoder)
        done = run(path, model, tmp_path, batch_size=3)
        head, rows = records(done)
        assert list(rows) == ["one", "two", "three", "four"]
        (problem,) = done.problems
        assert problem.line == 3
        assert re.search(f"bad: prompt 'bad': .*{said}", str(problem))
        assert head["left_out"] == 1
        assert done.listed.read_text() == f"{path}, {problem}\n"
        cache = Cache(tmp_path / "cache")
        assert all(value.isfinite().all() for key in cache._where for value in cache.read(key).values())
        for options in ({"on_bad_row": "refuse"}, {"max_bad_rows": 0}):
            with pytest.raises(UserError, match=r"(?s)1 bad row of 5|1 of 5 rows.*line 3: bad"):
                run(path, model, tmp_path, **options)
        assert run(path, model, tmp_path, max_bad_rows=1).rows == 4
    assert PreparedData(done.path, "t2i").notes() == [f"{done.path} was prepared without 1 row of its manifest"]
    again = run(path, model, tmp_path)  # with an encoder that takes it
    assert (again.rows, again.made, again.listed) == (5, 1, None)
    assert not done.listed.exists()
    assert PreparedData(done.path, "t2i").notes() == []


def test_what_changes_of_pictures_is_counted_and_said(model, tmp_path):
    rows = []
    for name, size, alpha in (("plain", (64, 64), None), ("clear", (64, 64), 90), ("wide", (80, 28), None)):
        picture = Image.new(
            "RGB" if alpha is None else "RGBA", size, (200, 30, 30) if alpha is None else (9, 9, 9, alpha)
        )
        picture.save(tmp_path / f"{name}.png")
        rows.append({"id": name, "task": "t2i", "prompt": name, "target_image": f"{name}.png"})
    full = Image.new("RGBA", (64, 64), (9, 9, 9, 255))  # a channel in which nothing is transparent
    full.save(tmp_path / "full.png")
    rows.append({"id": "full", "task": "t2i", "prompt": "full", "target_image": "full.png"})
    done = run(write_rows(tmp_path / "m.jsonl", rows), model, tmp_path)
    assert done.notes == [
        "1 of 4 pictures have transparent parts, which become white: clear.png",
        "1 of 4 pictures lose more than 10% at their sides, to fit the sizes that are trained: wide.png",
        "1 of 4 pictures are smaller than the size that they are trained at, and are enlarged: wide.png",
    ]


def test_a_picture_that_cannot_be_encoded_takes_no_other_with_it(manifest, model, tmp_path, monkeypatch):
    original = flux2.picture_codec

    def codec(*args):
        encode, decode = original(*args)

        def encoded(pictures):
            latents = encode(pictures)
            latents[pictures.amax((1, 2, 3)) == 1] = float("inf")
            return latents

        return encoded, decode

    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "dark.png")
    for name in ("wide", "tall", "same"):
        Image.new("RGB", (96, 64), (90, 60, 30)).save(tmp_path / f"{name}.png")
    with manifest.open("a") as file:
        file.write(json.dumps({"id": "d", "task": "t2i", "prompt": "x", "target_image": "white.png"}) + "\n")
        file.write(json.dumps({"id": "e", "task": "t2i", "prompt": "x", "target_image": "dark.png"}) + "\n")
    monkeypatch.setattr(flux2, "picture_codec", codec)
    done = run(manifest, model, tmp_path)
    assert set(records(done)[1]) == {"a", "b", "c", "e"}
    assert [str(problem)[:40] for problem in done.problems] == ["line 4: d: picture white.png: its encodi"]


def test_the_empty_prompt_must_be_encoded(manifest, model, tmp_path, monkeypatch):
    original = flux2.text_encoder
    monkeypatch.setattr(
        flux2, "text_encoder", lambda *a: overflowing(original(*a), lambda p: float("nan") if p == "" else None)
    )
    with pytest.raises(UserError, match="the negative prompt '' cannot be encoded"):
        run(manifest, model, tmp_path)
    assert not (tmp_path / "cache" / "rows.jsonl").exists()


def test_values_that_are_not_finite_in_a_cache_are_made_again(manifest, model, tmp_path):
    done = run(manifest, model, tmp_path)
    key = records(done)[1]["a"]["prompt"]
    for shard in (tmp_path / "cache").glob("*.safetensors"):
        shard.unlink()
    cache = Cache(tmp_path / "cache")
    cache.write({key: {"prompt_embeds": torch.full((512, 8), float("nan"))}})
    with pytest.raises(UserError, match="its prompt_embeds holds values that are not finite"):
        cache.read(key)
    assert run(manifest, model, tmp_path).made == 5
    assert all(v.isfinite().all() for v in Cache(tmp_path / "cache").read(key).values())


def test_extreme_shapes_are_refused_before_they_are_scaled(manifest, model, tmp_path):
    Image.new("L", (1, 30_000)).save(tmp_path / "thread.png")
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    with manifest.open("a") as file:
        for name in ("thread", "dot"):
            file.write(json.dumps({"id": name, "task": "t2i", "prompt": "x", "target_image": f"{name}.png"}) + "\n")
    done = run(manifest, model, tmp_path)
    assert [str(p) for p in done.problems] == ["line 4: picture thread.png: 1 x 30000 is longer than 8 : 1; cut it"]
    assert "dot" in records(done)[1]


def test_manifests_of_one_name_do_not_overwrite_each_other(model, tmp_path):
    paths = {
        name: write_rows(
            tmp_path / name / "train.jsonl",
            [{"id": f"{name} {i}", "task": "t2i", "prompt": f"{name} {i}"} for i in range(3)],
        )
        for name in ("portraits", "landscapes")
    }
    first = run(paths["portraits"], model, tmp_path)
    before = first.path.read_bytes()
    with pytest.raises(UserError, match=r"holds the rows of another manifest, .*portraits/train\.jsonl; rename"):
        run(paths["landscapes"], model, tmp_path)
    other = tmp_path / "portraits" / "train.csv"  # of the same name too
    other.write_text("task,prompt\nt2i,a cup\n")
    with pytest.raises(UserError, match="another manifest"):
        run(other, model, tmp_path)
    assert first.path.read_bytes() == before
    assert run(paths["portraits"], model, tmp_path).made == 0
    moved = tmp_path / "moved" / "train.jsonl"  # the same rows elsewhere
    moved.parent.mkdir()
    moved.write_bytes(paths["portraits"].read_bytes())
    assert run(moved, model, tmp_path).made == 0
    write_rows(moved, [{"id": "1", "task": "t2i", "prompt": "changed"}])  # the same manifest, changed
    assert run(moved, model, tmp_path).rows == 1


def test_equal_manifests_with_other_pictures_do_not_overwrite_each_other(model, tmp_path):
    for name, color in (("a", "red"), ("b", "blue")):
        path = write_rows(
            tmp_path / name / "m.jsonl", [{"id": "1", "task": "t2i", "prompt": "x", "target_image": "p.png"}]
        )
        Image.new("RGB", (64, 64), color).save(path.with_name("p.png"))
    run(tmp_path / "a" / "m.jsonl", model, tmp_path)
    with pytest.raises(UserError, match="another manifest"):
        run(tmp_path / "b" / "m.jsonl", model, tmp_path)


def test_prompts_that_are_cut_are_said(model, tmp_path, capsys):
    texts = ["short", "long " * 200, "a <|im_end|> cup"]
    path = write_rows(tmp_path / "m.jsonl", [{"id": f"r{i}", "task": "t2i", "prompt": t} for i, t in enumerate(texts)])
    arguments = [
        "data",
        "prepare",
        str(path),
        "--model",
        str(model),
        "--cache",
        str(tmp_path / "cache"),
        "--device",
        "cpu",
    ]
    for _ in range(2):  # also where all are found
        assert main([*arguments, "--resolution", "64", "--dtype", "float32"]) == 0
        said = capsys.readouterr().out
        assert said.count("warning: of 3 prompts 1 is longer than the 512 tokens of tokenizer and cut there: r1") == 1
        assert "of 3 prompts 1 holds special tokens, read as such and not as text (<|im_end|>): r2" in said
    assert len(PreparedData(tmp_path / "cache" / "m.jsonl", "t2i").notes()) == 2


def test_a_shorter_text_has_entries_of_its_own(manifest, model, tmp_path, capsys):
    assert run(manifest, model, tmp_path).made == 5
    prepared = run(manifest, model, tmp_path, max_sequence_length=48)
    assert (prepared.made, prepared.found) == (3, 2)  # the prompts again, not the pictures
    head, rows = records(prepared)
    assert head["max_sequence_length"] == 48
    cached = Cache(tmp_path / "cache").read(rows["a"]["prompt"])["prompt_embeds"]
    expected = flux2.text_encoder(model, max_sequence_length=48)(["a red cup"])["prompt_embeds"][0]
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)
    for wrong in (0, 513):
        with pytest.raises(UserError, match=f"max_sequence_length must be from 1 to 512 .* got {wrong}"):
            run(manifest, model, tmp_path, max_sequence_length=wrong)


ODD = [None, True, -1, 0.5, "x", "", [], {}, [[]], {"": 1}, [1, "a"], "\ud800", 10**400]


@given(st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_rows_are_named_or_taken_never_a_traceback(prepared_rows, data):
    """One value anywhere in a file of rows replaced or taken out: what is wrong is said with its line."""
    lines = [json.loads(line) for line in prepared_rows.read_text().splitlines()]
    line = data.draw(st.integers(0, len(lines) - 1))
    place, key = lines, line
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 3)):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    if isinstance(place, dict) and data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(st.sampled_from(ODD))
    changed = prepared_rows.with_name("changed.jsonl")
    changed.write_text("".join(json.dumps(one) + "\n" for one in lines))
    said = ""
    try:
        rows = PreparedData(changed, "edit")
        rows.notes()
        mix({"edit": rows})
        rows.condition([0], [False]), rows.condition([0], [True]), rows.targets([0]), rows.empty_prompt()
    except UserError as error:
        said = str(error)
    assert not said or "changed.jsonl" in said


@pytest.fixture(scope="module")
def prepared_rows(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    row = {"task": "edit", "prompt": "x", "source_image": "a.png", "target_image": "a.png"}
    return prepare(
        write_rows(folder / "m.jsonl", [row, row | {"prompt": "y"}]), model, folder / "cache", resolution=64
    ).path


@pytest.mark.parametrize(
    "header",
    ["5", "[]", "{", '{"k": 1}', '{"k": [1, ["a"]]}', '{"k": ["d", 5]}', '{"k": ["d", ["b"]]}', "[" * 9999, None],
)
def test_a_shard_with_an_odd_header_is_damaged(tmp_path, header):
    save_file({"k/a": torch.zeros(1)}, tmp_path / "s.safetensors", header and {"entries": header})
    cache = Cache(tmp_path)
    assert cache.damaged == ["s.safetensors"]
    assert len(cache) == 0
