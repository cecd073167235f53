# %% [markdown]
# # Two LoRAs into one
# The miniature is a FLUX.2 klein pipeline in small that ships with the package. Two of its LoRAs are called by a word:
# `night` paints the background dark, and `wood` makes things of wood. Loaded together they act on every prompt, whether
# their words stand in it or not. Here they become one LoRA of the size of one, which listens to both words.

# %%
from itertools import permutations
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import Flux2KleinPipeline

import danceopd
from danceopd.tools.merge_loras import Options, merge_loras

STEPS, WORK = 200, Path("two_loras")
ASSETS = Path(danceopd.__file__).parent / "miniature" / "assets"

# %% [markdown]
# Training needs prompts, and no pictures: the student draws its own.

# %%
things = [
    "a dog",
    "a cat",
    "a car",
    "an apple",
    "a boat",
    "a clock",
    "a cup",
    "a banana",
    "a pizza",
    "a bus",
    "a chair",
]
prompts = [f"a photo of {thing}" for thing in things]
prompts += [f"a photo of {one} and {other}" for one, other in permutations(things, 2)]
WORK.mkdir(exist_ok=True)
(WORK / "prompts.txt").write_text("\n".join(prompts))

# %% [markdown]
# A sample is asked of one source: the base for prompts as they are, a LoRA where its word stands in front, both
# together where both do. The loss is the squared distance between the student's velocity and the source's, at a state
# of the student's own rollout. The words that call a LoRA stand in its file.

# %%
training = ["training.batch_size=32", "training.optimizer=muon", "training.learning_rate=2e-3"]
options = Options(
    prompts=WORK / "prompts.txt",
    steps=STEPS,
    resolution=64,
    max_sequence_length=16,
    overwrite=True,
    overrides=[*training, "training.lr_schedule=cosine", "rollout.num_inference_steps=8"],
)
loras = [Path("miniature/night"), Path("miniature/wood")]
merged = merge_loras(Path("miniature"), loras, WORK / "merged.safetensors", options)

# %% [markdown]
# How much of the way from the base to each source is gone, by the error of the velocity along each one's own rollouts:

# %%
for line in merged.results.table():
    print("".join(f"{cell:>26}" if i else f"{cell:24}" for i, cell in enumerate(line)))
print(merged.results.verdict)

# %% [markdown]
# The result is a LoRA like any other: a plain pipeline of diffusers loads it.

# %%
pipeline = Flux2KleinPipeline.from_pretrained(ASSETS / "pipeline")
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
    return pipeline(prompt, guidance_scale=1.0, generator=generator, **sizes).images[0]


columns = [
    f"{words}a photo of {thing}"
    for thing in ("a boat", "a cup")
    for words in ("", "night, ", "wood, ", "night, wood, ")
]
axes = plt.subplots(len(mixes), len(columns), figsize=(14, 9), layout="constrained")[1]
for row, (name, mix) in enumerate(mixes.items()):
    for column, prompt in enumerate(columns):
        axes[row, column].imshow(draw(mix, prompt, 5))
        axes[row, column].set_title(prompt.replace("a photo of ", "\n") if row == 0 else "", fontsize=9)
    axes[row, 0].set_ylabel(name)
plt.setp(axes.flat, xticks=[], yticks=[])
plt.savefig("two_loras.png", dpi=110)
