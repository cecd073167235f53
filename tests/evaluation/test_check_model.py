"""`danceopd check-model`: every family draws as its pipeline does, stage by stage; a difference is seen where it is."""

import shutil

import pytest
import tiny_dreamlite
import tiny_flux
import tiny_flux2
import tiny_flux3
import tiny_krea2
import tiny_longcat_image
import tiny_prx
import tiny_qwen_image
import tiny_qwen_image_21
import tiny_sd3
import tiny_z_image
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21
from safetensors.torch import load_file, save_file

from danceopd.cli.parser import main
from danceopd.evaluation.check_model import How, check_model
from danceopd.models.backbones import krea2, longcat_image, qwen_image_21
from danceopd.support.errors import UserError

SIZE = (64, 64)

MADE = {
    "sd3": tiny_sd3.save_tiny,
    "flux": lambda folder: tiny_flux.save_tiny(folder, pipeline="FluxPipeline"),
    "kontext": tiny_flux.save_tiny,
    "klein": tiny_flux2.save_tiny,
    "flux2": lambda folder: tiny_flux2.save_tiny(folder, dev=True),
    "qwen": tiny_qwen_image.save_tiny,
    "qwen_edit": lambda folder: tiny_qwen_image.save_tiny(folder, edit=True),
    "qwen_21": tiny_qwen_image_21.save_tiny,
    "z": tiny_z_image.save_tiny,
    "longcat": tiny_longcat_image.save_tiny,
    "longcat_edit": lambda folder: tiny_longcat_image.save_tiny(folder, edit=True),
    "krea2": tiny_krea2.save_tiny,
    "dreamlite": tiny_dreamlite.save_tiny,
    "flux3": tiny_flux3.save_tiny,
    "prx": tiny_prx.save_tiny,
    "prx_deep": lambda folder: tiny_prx.save_tiny(folder, deep=True),
}
DRAW = [family for family in MADE if family not in ("qwen_edit", "longcat_edit")]
EDIT = ["kontext", "klein", "flux2", "qwen_edit", "qwen_21", "longcat_edit", "dreamlite", "flux3"]
CASES = [(family, "t2i", 1.0) for family in DRAW] + [(family, "edit", 1.0) for family in EDIT]
CASES += [(family, task, 4.0) for family, task, _ in CASES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = MADE[family](tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """The pipelines scale references to about 1024 x 1024 pixels, which tiny models need not see."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", SIZE[0] * SIZE[1])
    dimensions = pipeline_qwenimage21.calculate_dimensions
    monkeypatch.setattr(
        pipeline_qwenimage21, "calculate_dimensions", lambda area, ratio: dimensions(SIZE[0] * SIZE[1], ratio)
    )


@pytest.mark.parametrize(("family", "task", "guidance"), CASES)
def test_every_family_draws_as_its_pipeline_does(folders, family, task, guidance):
    references = 2 if task == "edit" and family not in ("kontext", "longcat_edit", "dreamlite") else 1
    how = How(task, SIZE, guidance=guidance, references=references)
    stages, first = check_model(folders(family), how, tolerance=2e-5)
    assert first is None
    names = [stage.name for stage in stages]
    assert names[-1] == "picture"
    if guidance == 1:
        assert {"noise level of step 1", "velocity of step 2"} <= set(names)
        compared = [stage for stage in stages if stage.difference is not None]
        assert {"velocity of step 1", "velocity of step 2", "picture"} <= {stage.name for stage in compared}


@pytest.mark.parametrize(
    ("function", "wrong", "seen"),
    [
        ("sigmas", lambda own: lambda *args: own(*args) ** 2, "noise level of step 2"),
        (
            "text_encoder",
            lambda own: lambda *args, **options: lambda prompts, pictures: own(*args, **options)(["x"], pictures),
            "encoded prompt of step 1",
        ),
        (
            "velocity",
            lambda own: lambda *args: own(*args[:1], 2 * args[1], *args[2:]),
            "latents and source pictures of step 1",
        ),
    ],
)
def test_it_says_where_a_difference_begins(folders, monkeypatch, function, wrong, seen):
    monkeypatch.setattr(longcat_image, function, wrong(getattr(longcat_image, function)))
    _, first = check_model(folders("longcat"), How("t2i", SIZE))
    assert first.name == seen


def test_a_wrong_decoder_is_seen_in_the_picture_alone(folders, monkeypatch):
    codec = krea2.picture_codec

    def darker(*args, **options):
        encode, decode = codec(*args, **options)
        return encode, lambda latents: decode(latents) - 0.1

    monkeypatch.setattr(krea2, "picture_codec", darker)
    _, first = check_model(folders("krea2"), How("t2i", SIZE))
    assert first.name == "picture"


def test_wrong_guidance_is_seen_in_the_picture(folders, monkeypatch):
    monkeypatch.setattr(longcat_image, "combine", lambda cond, uncond, scale: uncond + scale * (cond - uncond))
    assert check_model(folders("longcat"), How("t2i", SIZE, guidance=4.0))[1].name == "picture"


def test_what_a_model_does_not_do_is_said(folders, tmp_path):
    with pytest.raises(UserError, match="a LongCatImageEditPipeline does not do t2i"):
        check_model(folders("longcat_edit"), How("t2i", SIZE))
    with pytest.raises(UserError, match="a Krea2Pipeline does not do edit"):
        check_model(folders("krea2"), How("edit", SIZE))
    with pytest.raises(UserError, match="multiples of 32, got 64 x 48"):
        check_model(folders("qwen_21"), How("t2i", (64, 48)))


def test_what_is_not_whole_is_named(folders, tmp_path):
    broken = tmp_path / "krea2"
    shutil.copytree(folders("krea2"), broken)

    def said(message):
        with pytest.raises(UserError, match=message):
            check_model(broken, How("t2i", SIZE))

    weights = next((broken / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    key = max(tensors, key=lambda name: tensors[name].numel())
    save_file(tensors | {key: tensors[key] * float("nan")}, weights, {"format": "pt"})
    said(f"{broken}/transformer: {key} holds numbers that are not finite")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 97\n")
    said(f"{weights}: is a Git LFS pointer")
    shutil.rmtree(broken / "tokenizer")
    said(f"no tokenizer in {broken}, whose model_index.json names it; copy the whole pipeline")


def test_the_command(folders, monkeypatch, capsys):
    options = ["--resolution", "64", "--guidance-scale", "4"]
    assert main(["check-model", str(folders("krea2")), *options]) in (0, None)
    said = capsys.readouterr().out
    assert "velocity of step 2" in said
    assert "t2i, with guidance 4" in said
    assert "draws as its pipeline does" in said
    sigmas = qwen_image_21.sigmas
    monkeypatch.setattr(qwen_image_21, "sigmas", lambda *args: sigmas(*args) ** 2)
    assert main(["check-model", str(folders("qwen_21")), "--task", "t2i", *options]) == 1
    assert "differs first in: noise level of step 2" in capsys.readouterr().out
