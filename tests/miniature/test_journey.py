"""The whole way, `examples/journey.py`: from pictures to a LoRA in a plain pipeline, scored in both layouts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import Flux2KleinPipeline

from danceopd.config.reading import parse_config
from danceopd.miniature.shipped import PIPELINE
from danceopd.tools.students import checkpoint_of, lora_of

JOURNEY = Path(__file__).parents[2] / "examples" / "journey.py"

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("journey")
    few = ["--steps", str(STEPS), "--rows", "64", "--pictures", "4", "training.precision=fp32"]
    run = subprocess.run([sys.executable, JOURNEY, "--folder", folder, *few], capture_output=True, text=True)
    assert (folder / "journey.json").is_file(), run.stderr
    assert "of its sources the student keeps" in run.stdout
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_exports_score_alike_and_keep_something_of_both_sources(folder):
    scores = json.loads((folder / "journey.json").read_text())
    assert scores["comfyui"] == scores["diffusers"]  # one student in two layouts draws the same pictures
    for source, metric in (("t2i", "geneval_overall"), ("edit", "gedit_average")):
        assert scores["diffusers"][metric] > 0.3 * scores[source][metric]
    assert scores["t2i"]["geneval_overall"] > scores["edit"]["geneval_overall"]
    assert scores["edit"]["gedit_average"] > scores["t2i"]["gedit_average"]
    assert (folder / "compare.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_exported_lora_is_the_trainers_averaged_student(folder):
    """Its velocity in diffusers is that of the base's weights with the checkpoint's factors added by hand."""
    config = parse_config(yaml.safe_load((folder / "run" / "config.yaml").read_text()))
    pipeline = Flux2KleinPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    transformer, generator = pipeline.transformer, torch.Generator().manual_seed(0)
    asked = {
        "hidden_states": torch.randn(2, 16, transformer.config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(2, 8, transformer.config.joint_attention_dim, generator=generator),
        "timestep": torch.tensor([0.3, 0.9]),
        "img_ids": torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, 4, 4, 1))),
        "txt_ids": torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, 1, 1, 8))),
        "guidance": None,
        "return_dict": False,
    }

    def velocity():
        with torch.no_grad():
            return transformer(**asked)[0]

    base = velocity()
    changed = {}
    for name, (a, b, scale) in lora_of(config, checkpoint_of(folder / "run", STEPS)).items():
        weight = transformer.get_submodule(name).weight
        changed[weight] = weight.detach().clone()
        weight.data += scale * b.float() @ a.float()
    by_hand = velocity()
    for weight, before in changed.items():
        weight.data.copy_(before)
    torch.testing.assert_close(velocity(), base, rtol=0, atol=0)
    pipeline.load_lora_weights(next((folder / "diffusers").glob("*.safetensors")))
    exported = velocity()
    assert (by_hand - base).norm() > 0.02 * base.norm()
    assert (exported - by_hand).norm() < 0.01 * (by_hand - base).norm()
