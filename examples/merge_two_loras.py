# %% [markdown]
# # Two LoRAs, one that has both
# The miniature is a FLUX.2 klein pipeline in small that ships with the package. Its LoRA `t2i` draws better than the
# base, and its LoRA `edit` edits better; each forgets what the other knows. Here one LoRA of the same size learns from
# both, by prompts and pictures to edit, on its own trajectories.

# %%
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import Flux2KleinPipeline

import danceopd

STEPS, ROWS, WORK = 300, 1000, Path("two_loras")
ASSETS = Path(danceopd.__file__).parent / "miniature" / "assets"


def run(*words):
    """Runs a command as it is typed in a terminal."""
    subprocess.run([sys.executable, "-m", "danceopd", *map(str, words)], check=True)


# %% [markdown]
# Training needs prompts, pictures to edit, and their encodings, which are computed once.

# %%
prepared = WORK / "cache" / "manifest.jsonl"
run("miniature", "data", "--folder", WORK / "data", "--size", ROWS)
run("data", "prepare", WORK / "data" / "manifest.jsonl", "--model", "miniature", "--cache", prepared.parent,
    "--resolution", 64, "--max-sequence-length", 16, "--device", "cpu", "--quiet")  # fmt: skip

# %% [markdown]
# `configs/miniature.yaml` names both LoRAs. The loss is the squared distance between the student's velocity and that of
# the sample's source, at a state of the student's own rollout.

# %%
records = []
overrides = [f"training.output_dir={WORK / 'run'}", f"training.max_steps={STEPS}", "training.sample_every=0"]
overrides += [f"capabilities.{name}.data.prepared={prepared}" for name in ("t2i", "edit")] + ["evaluation.times=0"]
danceopd.distill("configs/miniature.yaml", overrides, overwrite=True, callbacks=[records.append])
run("export", WORK / "run", "-o", WORK / "merged")
print(f"loss {records[0]['loss']:.3f} at first, {records[-1]['loss']:.3f} at last")

# %% [markdown]
# What was exported is a LoRA like any other: a plain pipeline of diffusers loads it.

# %%
prompts = ["a photo of a dog above a clock", "a photo of three apples", "a photo of a yellow car and a blue cup"]
edits = ["replace the dog with a banana", "change the background to blue", "make the car red"]
pipeline = Flux2KleinPipeline.from_pretrained(ASSETS / "pipeline")
pipeline.set_progress_bar_config(disable=True)
for name in ("t2i", "edit"):
    pipeline.load_lora_weights(ASSETS / "sources" / name, adapter_name=name)
pipeline.load_lora_weights(WORK / "merged", adapter_name="distilled")
mixes = {"base": [], "t2i": ["t2i"], "edit": ["edit"], "average": ["t2i", "edit"], "distilled": ["distilled"]}


def draw(mix, prompt, seed, picture=None):
    """Draws with some of the LoRAs, each at an equal share."""
    if mix:
        pipeline.enable_lora()
        pipeline.set_adapters(mix, [1 / len(mix)] * len(mix))
    else:
        pipeline.disable_lora()
    generator = torch.Generator().manual_seed(seed)
    sizes = {"height": 64, "width": 64, "num_inference_steps": 16, "max_sequence_length": 16}
    return pipeline(prompt, image=picture, guidance_scale=1.0, generator=generator, **sizes).images[0]


pictures = [draw(["t2i"], prompt, 3) for prompt in prompts]  # which are edited then
axes = plt.subplots(len(mixes), 6, figsize=(12, 11), layout="constrained")[1]
for row, (name, mix) in enumerate(mixes.items()):
    drawn = [draw(mix, prompt, 5) for prompt in prompts]
    drawn += [draw(mix, edit, 5, picture) for edit, picture in zip(edits, pictures, strict=True)]
    for column, (picture, title) in enumerate(zip(drawn, prompts + edits, strict=True)):
        axes[row, column].imshow(picture)
        axes[row, column].set_title(title.removeprefix("a photo of ") if row == 0 else "", fontsize=8)
    axes[row, 0].set_ylabel(name)
plt.setp(axes.flat, xticks=[], yticks=[])
plt.savefig("two_loras.png", dpi=110)
