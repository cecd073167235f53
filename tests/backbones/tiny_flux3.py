"""A tiny random FLUX.3 folder of the real classes, as its modular pipeline saves it."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux3ModularPipeline, Flux3Transformer2DModel
from tiny_qwen3_vl import tiny_config, tiny_processor
from tiny_qwen_image import tiny_tokenizer
from transformers import Qwen3VLForConditionalGeneration

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny(folder, seed: int = 0) -> Path:
    """Save a whole folder. Sides are multiples of 16 pixels."""
    torch.manual_seed(seed)
    folder, tokenizer = Path(folder), tiny_tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    processor = tiny_processor(tokenizer)
    processor.chat_template = TEMPLATE
    parts = {
        "transformer": Flux3Transformer2DModel(
            in_channels=16,
            cond_in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8 * 16,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        "vae": vae,
        "text_encoder": Qwen3VLForConditionalGeneration(tiny_config(tokenizer, layers=33)),  # layers 4 to 32 are read
        "tokenizer": processor,
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {
        "_class_name": Flux3ModularPipeline.__name__,
        "_blocks_class_name": Flux3ModularPipeline.default_blocks_name,
    }
    for name, part in parts.items():
        library = "diffusers" if name in ("transformer", "vae") else "transformers"
        place = {"pretrained_model_name_or_path": str(folder), "subfolder": name}
        index[name] = [library, type(part).__name__, {**place, "type_hint": [library, type(part).__name__]}]
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    return folder
