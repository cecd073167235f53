# %% [markdown]
# # Two LoRAs into one
# The miniature is a FLUX.2 klein pipeline in small that ships with the package. Two of its LoRAs are called by a word:
# `night` paints the background dark, and `wood` makes things of wood. Loaded together they act on every prompt, whether
# their words stand in it or not. Here they become one LoRA of the size of one, which listens to both words.

# %%
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from diffusers import DiffusionPipeline

import danceopd

STEPS, WORK = 300, Path("two_loras")
ASSETS = Path(danceopd.__file__).parent / "miniature" / "assets"


def run(*words):
    """Runs a command as it is typed in a terminal, and shows what it prints."""
    command = [sys.executable, "-m", "danceopd", *map(str, words)]
    print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout)


# %% [markdown]
# Training needs prompts, and no pictures: the student draws its own.

# %%
things = ["a dog", "a cat", "a car", "an apple", "a boat", "a clock", "a cup", "a banana", "a pizza", "a bus"]
prompts = [f"a photo of {thing}" for thing in things]
prompts += [f"a photo of {one} and {other}" for one, other in permutations(things, 2)]
WORK.mkdir(exist_ok=True)
(WORK / "prompts.txt").write_text("\n".join(prompts))

# %% [markdown]
# A sample is asked of one source: the base for prompts as they are, a LoRA where its word stands in front, both
# together where both do. The loss is the squared distance between the student's velocity and the source's, at a state
# of the student's own rollout. The words that call a LoRA stand in its file. At the end it says which share of the way
# from the base to each source is gone, by the velocity's error along each one's own rollouts.

# %%
what = ["miniature/night", "miniature/wood", "--base", "miniature", "-o", WORK / "merged.safetensors"]
how = ["--prompts", WORK / "prompts.txt", "--steps", STEPS, "--patience", 0, "--quiet"]
training = ["training.batch_size=32", "training.optimizer=muon", "training.learning_rate=6e-3"]
run("merge-loras", *what, *how, *training, "training.lr_schedule=cosine", "rollout.num_inference_steps=8")

# %% [markdown]
# The result is a LoRA like any other: a plain pipeline of diffusers loads it.

# %%
pipeline: Any = DiffusionPipeline.from_pretrained(ASSETS / "pipeline", dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
for name in ("night", "wood"):
    pipeline.load_lora_weights(ASSETS / "sources" / name, adapter_name=name)
pipeline.load_lora_weights(WORK / "merged.safetensors", adapter_name="merged")
mixes = {"base": [], "night": ["night"], "wood": ["wood"], "both loaded": ["night", "wood"], "merged": ["merged"]}


def draw(mix, prompt, seed):
    """Draws with some of the LoRAs."""
    if mix:
        pipeline.enable_lora()
        pipeline.set_adapters(mix)
    else:
        pipeline.disable_lora()
    generator = torch.Generator().manual_seed(seed)
    sizes = {"height": 64, "width": 64, "num_inference_steps": 16, "max_sequence_length": 16}
    return pipeline(prompt=prompt, guidance_scale=1.0, generator=generator, **sizes).images[0]


called = ("", "night, ", "wood, ", "night, wood, ")
columns = [f"{words}a photo of {thing}" for thing in ("a boat", "a cup") for words in called]
axes = plt.subplots(len(mixes), len(columns), figsize=(12, 8), layout="constrained")[1]
for row, (name, mix) in enumerate(mixes.items()):
    for column, prompt in enumerate(columns):
        axes[row, column].imshow(draw(mix, prompt, 5))
        axes[row, column].set_title(prompt.replace("a photo of ", "\n") if row == 0 else "", fontsize=9)
    axes[row, 0].set_ylabel(name)
plt.setp(axes.flat, xticks=[], yticks=[])
plt.savefig("two_loras.png", dpi=110)
