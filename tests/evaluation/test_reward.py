"""Rewards by real CLIP classes, tiny and random; the share of the gap closed; the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny_flux import clip_tokenizer
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from danceopd.cli.parser import main
from danceopd.evaluation.geneval.layout import read_pictures
from danceopd.evaluation.reward import (
    aesthetic_score,
    check_prompt,
    clip_score,
    gap_closed,
    hps_score,
    pick_score,
    read_head,
    reward_of,
)
from danceopd.support.errors import UserError

WIDTH = 12
PROMPTS = ["a red cup", "Two dogs, left of a very long sentence about nothing at all " * 4, "x"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIPModel's folder of the real classes, with its processor."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "words")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": len(tokenizer)},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=WIDTH,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)  # else all prompts and pictures look alike to so small a model
    model.save_pretrained(folder / "model")
    size = {"shortest_edge": 32}
    processor = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder / "model")
    return folder / "model"


def pictures(count: int = 3, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    sizes = [(40 + 9 * i, 70 - 8 * i, 3) for i in range(count)]
    return [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def save_head(path: Path, widths=(WIDTH, 10, 8, 6, 4, 1), prefix="layers.") -> nn.Module:
    """The aesthetic predictor's own structure, and its weights as a safetensors file."""
    torch.manual_seed(1)
    a, b, c, d, e, f = widths
    drop = nn.Dropout
    layers = nn.Sequential(
        *(nn.Linear(a, b), drop(0.2), nn.Linear(b, c), drop(0.2), nn.Linear(c, d), drop(0.1)),
        *(nn.Linear(d, e), nn.Linear(e, f)),
    ).eval()
    save_file({f"{prefix}{name}": value for name, value in layers.state_dict().items()}, path)
    return layers


def lay_out(folder: Path, prompts, drawn: list[list[Image.Image]]) -> Path:
    """Pictures in GenEval's layout."""
    for i, (prompt, images) in enumerate(zip(prompts, drawn, strict=True)):
        place = folder / f"{i:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps({"tag": "colors", "prompt": prompt}) + "\n")
        for n, image in enumerate(images):
            image.save(place / "samples" / f"{n:04d}.png")
    return folder


# ------------------------------------------------------------------------------------------------- models


def test_preference_models_are_what_transformers_computes(clip):
    """By the model's own forward, one pair at a time and without padding, as the models' cards call it."""
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    drawn, scale = pictures(), float(model.logit_scale.detach().exp())
    logits = []
    for picture, prompt in zip(drawn, PROMPTS, strict=True):
        inputs = processor(text=[prompt], images=[picture], truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            logits.append(float(model(**inputs).logits_per_image))
    logits = torch.tensor(logits)
    assert logits.unique().numel() == 3
    torch.testing.assert_close(pick_score(clip)(drawn, PROMPTS), logits)
    torch.testing.assert_close(hps_score(clip)(drawn, PROMPTS), logits / scale)
    torch.testing.assert_close(clip_score(clip)(drawn, PROMPTS), (100 * logits / scale).clamp(min=0))


def test_the_aesthetic_head_is_on_normalised_picture_embeddings(clip, tmp_path):
    layers = save_head(tmp_path / "head.safetensors")
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    drawn = pictures()
    with torch.no_grad():
        embeds = model.visual_projection(
            model.vision_model(**processor(images=drawn, return_tensors="pt")).pooler_output
        )
        expected = layers(embeds / embeds.norm(dim=-1, keepdim=True))[:, 0]
    score = aesthetic_score(clip, tmp_path / "head.safetensors")
    torch.testing.assert_close(score(drawn, PROMPTS), expected)
    assert torch.equal(score(drawn, PROMPTS), score(drawn, ["other"] * 3))


@pytest.mark.parametrize("name", ["clip", "pick", "hps", "aesthetic"])
def test_a_batch_is_as_each_alone(name, clip, tmp_path):
    save_head(tmp_path / "head.safetensors")
    make = {"clip": clip_score, "pick": pick_score, "hps": hps_score}
    score = make[name](clip) if name in make else aesthetic_score(clip, tmp_path / "head.safetensors")
    drawn = pictures()
    together = score(drawn, PROMPTS)
    assert together.dtype == torch.float32
    assert together.shape == (3,)
    alone = torch.cat([score([picture], [prompt]) for picture, prompt in zip(drawn, PROMPTS, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert make.get(name, lambda f, **k: score)(clip, dtype=torch.bfloat16)(drawn, PROMPTS).dtype == torch.float32


def test_heads_of_one_layer_of_any_prefix_and_what_is_none(tmp_path):
    path = tmp_path / "head.safetensors"
    layers = save_head(path, prefix="module.mlp.layers.")
    x = torch.randn(2, WIDTH)
    torch.testing.assert_close(read_head(path)(x), layers(x))
    save_file({"weight": torch.ones(1, WIDTH), "bias": torch.zeros(1)}, path)
    torch.testing.assert_close(read_head(path)(x)[:, 0], x.sum(-1))
    relu = {f"layers.{i}.{kind}": torch.zeros(4, 4) for i in (0, 3, 6, 9, 11) for kind in ("weight", "bias")}
    for tensors in (
        relu,
        {"weight": torch.ones(2, WIDTH), "bias": torch.zeros(2)},
        {"weight": torch.ones(1, WIDTH)},
        {"weight": torch.ones(1, WIDTH), "bias": torch.zeros(1), "extra": torch.zeros(1)},
        {"other": torch.zeros(1)},
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match="is no aesthetic head"):
            read_head(path)
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_head(path)
    with pytest.raises(UserError, match="there is no file"):
        read_head(tmp_path / "nowhere.safetensors")
    torch.save({}, tmp_path / "head.pth")
    with pytest.raises(UserError, match="must be a safetensors file"):
        read_head(tmp_path / "head.pth")


# ------------------------------------------------------------------------------------------------- pictures


def test_a_prompts_reward_is_the_mean_of_its_pictures(tmp_path):
    counts = [1, 3, 2]
    drawn = [[Image.new("RGB", (2, 2), (10 * i + n, 0, 0)) for n in range(count)] for i, count in enumerate(counts)]
    there = read_pictures(lay_out(tmp_path, PROMPTS, drawn), check=check_prompt)
    asked = []

    def red(images, prompts):
        asked.extend(prompts)
        return torch.tensor([image.getpixel((0, 0))[0] for image in images], dtype=torch.float32)

    for batch_size in (1, 4, 16):
        assert reward_of(there, red, batch_size).tolist() == [0, 11, 20.5]
    assert asked[:6] == [PROMPTS[0], *[PROMPTS[1]] * 3, *[PROMPTS[2]] * 2]
    with pytest.raises(UserError, match=r"not finite for .*00001/samples/0000.png"):
        reward_of(there, lambda images, prompts: red(images, prompts).where(red(images, prompts) != 10, np.nan))


# ------------------------------------------------------------------------------------------------- the gap


def test_the_share_by_hand_and_its_interval():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 400)
    source, student = base + rng.normal(1, 0.2, 400), base + rng.normal(0.8, 0.2, 400)
    gap = gap_closed(base, source, student)
    assert gap.share == pytest.approx((student.mean() - base.mean()) / (source.mean() - base.mean()))
    assert gap.low < gap.share < gap.high
    assert gap.open_gap
    # Of a ratio of means of paired differences, by the delta method.
    lead, way = source - base, student - base
    error = np.std(way - gap.share * lead) / lead.mean() / np.sqrt(400)
    assert gap.high - gap.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    order = rng.permutation(400)  # unpaired, the noise of the prompts would be in it
    assert gap_closed(base, source[order], student[order[::-1]]).high - gap.low > 2 * (gap.high - gap.low)
    assert gap == gap_closed(base, source, student)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        base = rng.normal(0, 1, 80)
        gap = gap_closed(
            base, base + rng.normal(1, 0.5, 80), base + rng.normal(0.6, 0.5, 80), resamples=400, confidence=0.9
        )
        inside += gap.low <= 0.6 <= gap.high
    assert 0.83 < inside / 200 < 0.96


@given(st.floats(0.1, 5), st.floats(-3, 3), st.integers(2, 30), st.integers(0, 100))
def test_the_share_does_not_depend_on_the_rewards_scale(scale, offset, count, seed):
    base, source, student = np.random.default_rng(seed).normal([[0], [2], [1]], 0.1, (3, count))
    one = gap_closed(base, source, student, resamples=50)
    two = gap_closed(*(scale * x + offset for x in (base, source, student)), resamples=50)
    assert (two.share, two.low, two.high) == pytest.approx((one.share, one.low, one.high))
    assert gap_closed(base, source, source, resamples=50).low == pytest.approx(1)
    assert gap_closed(base, source, base, resamples=50).high == pytest.approx(0)


def test_a_source_that_is_no_better_leaves_no_gap():
    rng = np.random.default_rng(2)
    base = rng.normal(0, 1, 50)
    assert not gap_closed(base, base + rng.normal(0, 1, 50), base).open_gap
    assert not gap_closed(base, base, base).open_gap
    assert not gap_closed(base, base - 1, base).open_gap


# ------------------------------------------------------------------------------------------------- the command


def test_the_command_scores_and_closes_the_gap(clip, tmp_path, capsys):
    save_head(tmp_path / "head.safetensors")
    drawn = {name: [pictures(2, 10 * s + i) for i in range(3)] for s, name in enumerate(("base", "source", "student"))}
    folders = {name: str(lay_out(tmp_path / name, PROMPTS, images)) for name, images in drawn.items()}
    models = ["--clip", str(clip), "--pickscore", str(clip), "--hps", str(clip)]
    models += ["--aesthetic", str(clip), "--aesthetic-head", str(tmp_path / "head.safetensors")]
    common = ["evaluate", "reward", folders["student"], "--device", "cpu", "--dtype", "float32", *models]
    pair = ["--base", folders["base"], "--source", folders["source"], "--json", str(tmp_path / "out.json")]
    assert main([*common, *pair]) == 0
    printed = capsys.readouterr().out
    assert printed.count("gap closed") == 4
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(results) == ["clip", "pickscore", "hps", "aesthetic"]
    each = hps_score(clip)([p for images in drawn["student"] for p in images], [p for p in PROMPTS for _ in range(2)])
    assert results["hps"]["student"] == pytest.approx(float(each.mean()), abs=1e-5)
    hps = results["hps"]
    assert hps["gap"]["share"] == pytest.approx((hps["student"] - hps["base"]) / (hps["source"] - hps["base"]))
    assert main(common) == 0
    assert "gap closed" not in capsys.readouterr().out


def test_what_a_user_gets_wrong(clip, tmp_path, capsys):
    save_head(tmp_path / "head.safetensors")
    save_head(tmp_path / "wide.safetensors", (WIDTH + 1, 4, 4, 4, 4, 1))
    drawn = [pictures(1, i) for i in range(3)]
    folder = lay_out(tmp_path / "drawn", PROMPTS, drawn)
    other = lay_out(tmp_path / "other", ["another", *PROMPTS[1:]], drawn)
    fewer = lay_out(tmp_path / "fewer", PROMPTS[:2], drawn[:2])
    plain = ["--clip", str(clip)]
    head = ["--aesthetic", str(clip), "--aesthetic-head"]
    cases = [
        (folder, [], "no reward"),
        (folder, ["--aesthetic", str(clip)], "go together"),
        (folder, [*plain, "--base", str(folder)], "go together"),
        (folder, ["--clip", str(tmp_path / "nowhere")], "there is no folder"),
        (folder, ["--clip", str(folder)], "cannot be loaded as CLIPProcessor"),
        (folder, [*head, str(tmp_path / "nowhere.safetensors")], "there is no file"),
        (folder, [*head, str(tmp_path / "wide.safetensors")], "takes 13 features, and the CLIP"),
        (tmp_path / "nowhere", plain, "there is no folder"),
        (tmp_path, plain, "holds no pictures in GenEval's layout"),
        (folder, [*plain, "--base", str(other), "--source", str(folder)], "1 differ, such as 00000"),
        (folder, [*plain, "--base", str(folder), "--source", str(fewer)], "1 differ, such as 00002"),
    ]
    for at, more, said in cases:
        assert main(["evaluate", "reward", str(at), "--device", "cpu", *more]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "reward", str(folder), *plain, "--batch-size", "0"])
    assert "--batch-size: must be at least 1, not 0" in capsys.readouterr().err
    picture = folder / "00001" / "samples" / "0000.png"
    for damage, said in (
        (lambda: picture.write_bytes(b"\x89PNG cut"), f"damaged pictures: {picture}"),
        (picture.unlink, "00001 lack pictures"),
        (lambda: (folder / "00000" / "metadata.jsonl").write_text("[]\n"), 'jsonl:1: no text under "prompt"'),
        (lambda: (folder / "00000" / "metadata.jsonl").write_text('{"prompt": "a'), "jsonl:1: not JSON"),
    ):
        damage()
        assert main(["evaluate", "reward", str(folder), "--device", "cpu", *plain]) == 2
        assert said in capsys.readouterr().err
