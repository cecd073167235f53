"""GenEval's pictures: the same in any batch, on any rank and after a stop."""

import json
import shutil

import numpy as np
import pytest
import tiny_flux
import tiny_qwen_image
import torch
from diffusers import StableDiffusion3Pipeline
from geneval_runs import METADATA, close, pixels
from peft import LoraConfig

from danceopd.evaluation.geneval.draw import Drawing, draw_pictures, sample_seed
from danceopd.evaluation.geneval.layout import read_pictures
from danceopd.support.errors import UserError
from danceopd.support.ranks import Ranks


def how(model, **more):
    return Drawing(model, num_inference_steps=2, resolution=32, dtype=torch.float32, **more)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Pictures that were drawn in one go, two at a time."""
    folder = tmp_path_factory.mktemp("whole")
    assert draw_pictures(METADATA, folder, how(model, samples=4, batch_size=2)) == 8
    return folder


def of_samples(drawn, number):
    return {name: value for name, value in drawn.items() if int(name[-8:-4]) < number}


def test_pictures_are_drawn_in_the_layout_whatever_the_batch_and_again_only_where_one_is_missing(
    tmp_path, model, whole
):
    folder = shutil.copytree(whole, tmp_path / "out")
    drawn = read_pictures(folder, METADATA, 4)
    assert [p.name for p in drawn[0].pictures.values()] == [f"{i:04d}.png" for i in range(4)]
    whole = pixels(whole)
    values = [value.tobytes() for value in whole.values()]
    assert len(set(values)) == 8, "pictures share their noise"
    assert draw_pictures(METADATA, folder, how(model)) == 0
    (folder / "00001" / "samples" / "0002.png").unlink()
    assert draw_pictures(METADATA, folder, how(model, batch_size=1)) == 1
    assert close(pixels(folder), whole)
    assert draw_pictures(METADATA[:1], tmp_path / "four", how(model)) == 4
    assert close(pixels(tmp_path / "four"), {name: value for name, value in whole.items() if name < "00001"})
    assert draw_pictures(METADATA, tmp_path / "seed", how(model, seed=1, samples=1)) == 2
    assert not close(pixels(tmp_path / "seed"), of_samples(whole, 1), 8)


class Part(Ranks):
    """One of several ranks, the others of which nothing is heard from."""

    def gather(self, value):
        return [value]


def test_pictures_are_the_same_whichever_rank_draws_them(tmp_path, model, whole):
    for rank in (0, 1):
        assert draw_pictures(METADATA, tmp_path / "ranks", how(model, samples=2), Part(rank, 2)) == 2
    assert close(pixels(tmp_path / "ranks"), of_samples(pixels(whole), 2), 0)


def test_a_run_that_is_stopped_goes_on(tmp_path, model, whole):
    def stopped(items):
        yield items[0]
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        draw_pictures(METADATA, folder, how(model, samples=2), progress=stopped)
    assert len(pixels(folder)) == 2
    assert draw_pictures(METADATA, folder, how(model, samples=2)) == 2
    assert close(pixels(folder), of_samples(pixels(whole), 2), 0)
    assert not list(folder.rglob("*.tmp"))


def test_a_folder_is_not_mixed(tmp_path, model):
    folder, one = tmp_path / "out", how(model, samples=1)
    draw_pictures(METADATA, folder, one)
    with pytest.raises(UserError, match=r"drawn with another seed, guidance_scale; draw into"):
        draw_pictures(METADATA, folder, how(model, samples=1, seed=3, guidance_scale=2.0))
    with pytest.raises(UserError, match=r"00001.metadata\.jsonl is not line 2"):
        draw_pictures(METADATA[:1], folder, one)
    (folder / "generation.json").write_text("{")
    with pytest.raises(UserError, match=r"generation\.json is damaged"):
        draw_pictures(METADATA, folder, one)
    (folder / "generation.json").unlink()
    with pytest.raises(UserError, match="another tool drew"):
        draw_pictures(METADATA, folder, one)
    with pytest.raises(UserError, match="missing"):
        draw_pictures(METADATA, tmp_path / "new", how(model, lora=tmp_path / "missing"))
    assert not (tmp_path / "new").exists()


def test_an_exported_adapter_is_drawn_with_as_diffusers_does(tmp_path, model):
    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(0)
    state = {k.replace(".default", ""): v for k, v in pipeline.transformer.state_dict().items() if "lora_" in k}
    state = {key: torch.randn(value.shape, generator=generator) for key, value in state.items()}
    pipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=state)
    one = how(model, samples=1, lora=tmp_path / "lora", guidance_scale=3.0)
    draw_pictures(METADATA[:1], tmp_path / "with", one)
    draw_pictures(METADATA[:1], tmp_path / "without", how(model, samples=1, guidance_scale=3.0))
    plain = StableDiffusion3Pipeline.from_pretrained(model)
    plain.load_lora_weights(tmp_path / "lora")
    noise = torch.Generator().manual_seed(sample_seed(0, 0, 0))
    expected = plain(
        METADATA[0]["prompt"], height=32, width=32, num_inference_steps=2, guidance_scale=3.0, generator=noise
    ).images[0]
    expected = {"00000/samples/0000.png": np.asarray(expected).astype(int)}
    assert close(pixels(tmp_path / "with"), expected)
    assert not close(pixels(tmp_path / "without"), expected, 2)
    # A whole transformer instead, as export --merge writes it.
    plain.fuse_lora()
    plain.unload_lora_weights()
    plain.transformer.save_pretrained(tmp_path / "merged")
    draw_pictures(
        METADATA[:1], tmp_path / "merge", how(model, samples=1, transformer=tmp_path / "merged", guidance_scale=3.0)
    )
    assert close(pixels(tmp_path / "merge"), expected, 2)
    strange = {"transformer.nowhere.lora_A.weight": torch.zeros(2, 4)}
    from safetensors.torch import save_file

    save_file(strange, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match="nowhere"):
        draw_pictures(METADATA, tmp_path / "strange", how(model, lora=tmp_path / "strange.safetensors"))


def test_guidance_and_size_reach_pipelines_that_name_them_otherwise(tmp_path):
    qwen = tiny_qwen_image.save_tiny(tmp_path / "qwen")
    drawn = {}
    for scale in (1.0, 60.0):
        draw_pictures(METADATA[:1], tmp_path / f"g{scale}", how(qwen, samples=1, guidance_scale=scale))
        drawn[scale] = pixels(tmp_path / f"g{scale}")
    assert not close(drawn[1.0], drawn[60.0], 8)
    kontext = tiny_flux.save_tiny(tmp_path / "kontext")
    draw_pictures(METADATA[:1], tmp_path / "k", how(kontext, samples=1))
    assert [value.shape for value in pixels(tmp_path / "k").values()] == [(32, 32, 3)]
    edit = json.loads((qwen / "model_index.json").read_text()) | {"_class_name": "QwenImageEditPlusPipeline"}
    (qwen / "model_index.json").write_text(json.dumps(edit))
    with pytest.raises(UserError, match="cannot draw from a prompt alone; give a text-to-image"):
        draw_pictures(METADATA[:1], tmp_path / "edit", how(qwen, lora=tmp_path / "is looked at later"))
    assert not (tmp_path / "edit").exists()
    with pytest.raises(UserError, match=r"no model_index\.json"):
        draw_pictures(METADATA[:1], tmp_path / "edit", how(kontext / "vae"))
