"""merge-loras: from two LoRAs and prompts to one adapter of the size of one that is nearer to both than their mean."""

import diffusers
import pytest
import tiny_flux
import torch
import yaml
from PIL import Image
from tiny_sd3 import save_tiny

from danceopd.cli.parser import main
from danceopd.core.conditioning import Conditioning
from danceopd.core.distance import velocity_error
from danceopd.models.backbones import empty_transformer, flux, sd3
from danceopd.models.lora_algebra import average
from danceopd.models.lora_files import load_lora, save_lora
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.support.errors import UserError
from danceopd.tools.merge_loras import merge_loras, read_prompts, targets_of

SD3, STEPS = diffusers.StableDiffusion3Pipeline, 2
WORDS = ["cup", "car", "cat", "tree", "house", "lamp", "boat", "bird"]
TRIGGERS = {"ink": "INK", "oil": "???"}


def random_lora(transformer, seed, rank=2, targets=sd3.LORA_TARGETS):
    """An adapter far from the base."""
    generator, lora = torch.Generator().manual_seed(seed), {}
    for name in target_layers(transformer, targets):
        out, width = transformer.get_submodule(name).weight.shape
        a = torch.randn(rank, width, generator=generator) / width**0.5
        lora[name] = (a, 2 * torch.randn(out, rank, generator=generator), 1.0)
    return lora


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    model = save_tiny(root / "model")
    for name, seed in (("ink", 1), ("oil", 5)):
        save_lora(random_lora(empty_transformer(model), seed), root / name, SD3)
    (root / "prompts.txt").write_text("".join(f"a {word}\n" for word in WORDS))
    return root


def command(place, output, *more):
    given = ["--base", place / "model", "--lora", place / "ink", "--lora", place / "oil", "--resolution", 32]
    given += ["--prompts", place / "prompts.txt", "-o", output]
    for name, words in TRIGGERS.items():
        given += ["--trigger", f"{name}={words}"]
    settings = [f"rollout.num_inference_steps={STEPS}", "training.batch_size=8", "training.learning_rate=2e-2"]
    return ["merge-loras", *map(str, given), *more, *settings, "training.ema_decay=0.8", "training.warmup_steps=1"]


def test_nearer_to_each_than_the_average(place, tmp_path, capsys):
    output = tmp_path / "merged.safetensors"
    assert main(command(place, output, "--steps", "15")) == 0
    assert main(command(place, output, "--steps", "36")) == 0  # the same run goes on
    said = capsys.readouterr().out
    assert "going on from step 15" in said
    assert "ink: weight average" in said
    with Image.open(tmp_path / "merged.png") as grid:
        assert grid.width == 4 * 160
        assert grid.height > 4 * 160
        assert grid.convert("L").getextrema()[1] > grid.convert("L").getextrema()[0]
    transformer = sd3.load_transformer(place / "model")
    teachers = [load_lora(place / name, transformer, SD3) for name in TRIGGERS]
    student = load_lora(output, transformer, SD3)
    sizes = [sum(a.numel() + b.numel() for a, b, _ in lora.values()) for lora in (*teachers, student)]
    assert sizes[0] == sizes[1] == sizes[2]
    # On prompts that it never saw, and noise of its own.
    encode, sigmas = sd3.text_encoder(place / "model"), sd3.sigmas(place / "model", STEPS, 32, 32)
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(9))
    shared = SharedBase(transformer, [*teachers, average(teachers), student], sd3.velocity)
    for m, trigger in enumerate(TRIGGERS.values()):
        prompt = encode([f"{trigger} a {word}" for word in ("chair", "horse", "spoon", "clock")])
        conditioning = Conditioning(prompt, None, torch.zeros(4, dtype=torch.bool))
        mean, distilled = (
            velocity_error(shared.field(i), shared.field(m), noise, conditioning, sigmas) for i in (2, 3)
        )
        print(f"{trigger}: average {mean:.4f}, distilled {distilled:.4f}")
        assert distilled < 0.8 * mean
    pipeline = SD3.from_pretrained(place / "model")
    pipeline.load_lora_weights(tmp_path, weight_name="merged.safetensors")
    assert pipeline.get_active_adapters()


def test_a_model_that_embeds_its_guidance_is_asked_with_it(place, tmp_path, monkeypatch):
    model = tiny_flux.save_tiny(tmp_path / "model", pipeline="FluxPipeline", guidance_embeds=True)
    for name, seed in (("ink", 1), ("oil", 5)):
        lora = random_lora(empty_transformer(model), seed, targets=["to_q"])
        save_lora(lora, tmp_path / name, diffusers.FluxPipeline)
    asked, original = set(), flux.velocity

    def velocity(*args):
        asked.update(args[-1].tolist())
        return original(*args)

    monkeypatch.setattr(flux, "velocity", velocity)
    given = [tmp_path / "ink", tmp_path / "oil"], place / "prompts.txt", tmp_path / "out.safetensors"
    options = {"resolution": 32, "guidance_scale": 3.5, "triggers": [f"{n}={w}" for n, w in TRIGGERS.items()]}
    few = ["training.batch_size=2", f"rollout.num_inference_steps={STEPS}"]
    merged = merge_loras(model, *given, steps=1, overrides=few, **options)
    assert asked == {3.5}
    assert merged.path.is_file()
    config = yaml.safe_load((tmp_path / "out.work" / "run" / "config.yaml").read_text())
    assert {source["guidance_scale"] for source in config["sources"].values()} == {1.0}


def test_the_average_is_the_mean_of_what_they_add(place):
    transformer = empty_transformer(place / "model")
    loras = [random_lora(transformer, 1), random_lora(transformer, 5, rank=3, targets=["to_q"])]
    mean = average(loras)
    for name, (a, b, scale) in mean.items():
        expected = sum(s * y @ x for x, y, s in (lora[name] for lora in loras if name in lora)) / 2
        torch.testing.assert_close(scale * b @ a, expected)


def test_the_students_layers_are_those_of_the_loras(place):
    transformer = empty_transformer(place / "model")
    loras = [random_lora(transformer, 1, targets=["attn.to_q"]), random_lora(transformer, 1, targets=["ff.net.0.proj"])]
    assert targets_of(loras, transformer) == ["attn.to_q", "ff.net.0.proj"]
    one = {name: value for name, value in loras[0].items() if ".1." in name}
    assert targets_of([one], transformer) == ["transformer_blocks.1.attn.to_q"]


def test_prompts(tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("a cup\n\nink\ta fish, in ink\na cup\n", encoding="utf-8-sig")
    asked = read_prompts(path, ["ink", "oil"], {"oil": "oil style,"})
    assert asked == {"ink": ["a cup", "a fish, in ink"], "oil": ["oil style, a cup"]}
    assert not capsys.readouterr().err
    read_prompts(path, ["ink", "oil"], {})
    assert "1 prompts are asked of every LoRA" in capsys.readouterr().err


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c", "\x1e"])
def test_a_prompt_with_a_separator_is_one(tmp_path, separator):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a cup{separator}on a table\r\na dog\r\n".encode("utf-8-sig"))
    assert read_prompts(path, ["ink"], {}) == {"ink": [f"a cup{separator}on a table", "a dog"]}
    path.write_text(f"a cup{separator}on a table\na dog\nnone\tx\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3: no LoRA 'none'"):
        read_prompts(path, ["ink"], {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no prompt for ink[\s\S]*no prompt for oil"),
        ("ink\ta cup\n", "no prompt for oil"),
        (
            "a cup\ninc\ta cup\noil\t \n",
            r"line 2: no LoRA 'inc'.*did you mean 'ink'[\s\S]*line 3: no prompt after 'oil'",
        ),
    ],
)
def test_prompts_of_no_use(tmp_path, text, message):
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "prompts.txt", ["ink", "oil"], {})


def test_what_is_wrong_is_said_before_anything_is_encoded(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sd3, "text_encoder", lambda *_: 1 / 0)
    loras, prompts, out = [place / "ink", place / "oil"], place / "prompts.txt", tmp_path / "out.safetensors"

    def refused(message, base=place / "model", loras=loras, prompts=prompts, out=out, resolution=32, **options):
        with pytest.raises(UserError, match=message):
            merge_loras(base, loras, prompts, out, resolution=resolution, **options)
        assert list(tmp_path.glob("out*")) == []

    wider = save_tiny(tmp_path / "wider", num_attention_heads=4, caption_projection_dim=32)
    save_lora(random_lora(empty_transformer(wider), 1), tmp_path / "wide", SD3)
    refused(r"no model_index\.json", base=tmp_path)
    refused("needs two LoRAs", loras=loras[:1])
    refused("two LoRAs would be called 'ink'", loras=[*loras, place / "ink"])
    refused(r"gone.*no LoRA there[\s\S]*trained for another model", loras=[tmp_path / "gone", tmp_path / "wide"])
    refused("no file of prompts", prompts=tmp_path / "gone.txt")
    refused("must end in .safetensors", out=tmp_path / "out")
    refused("did you mean 'ink'", triggers=["inc=INK"])
    refused("not of the form", triggers=["ink"])
    refused("multiples of", resolution=33)
    refused("greater than 0", rank=0)
    refused("unknown key", overrides=["training.stepps=3"])
