"""FLUX.2 pipeline folders of diffusers' own classes, tiny and random."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
)


def _qwen():
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(specials + BYTES)}
    tokenizer = Qwen2TokenizerFast(vocab=vocab, merges=[], additional_special_tokens=specials[1:])
    tokenizer.chat_template = QWEN_TEMPLATE
    # The pipeline reads the layers 9, 18 and 27.
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 28, "vocab_size": len(vocab)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    return tokenizer, Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, initializer_range=0.3, tie_word_embeddings=True))


def _mistral():
    specials = ["<pad>", "<s>", "</s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    vocab = {token: i for i, token in enumerate(specials + BYTES)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": specials[3:]})
    tokenizer.chat_template = MISTRAL_TEMPLATE
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 4}
    # The pipeline reads the layers 10, 20 and 30.
    text = {
        **sizes,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "num_hidden_layers": 31,
        "vocab_size": len(vocab),
    }
    vision = {**sizes, "model_type": "pixtral", "num_hidden_layers": 1, "patch_size": 4, "image_size": 16}
    config = Mistral3Config(
        text_config={**text, "model_type": "mistral"}, vision_config=vision, image_token_index=vocab["[IMG]"]
    )
    return tokenizer, Mistral3ForConditionalGeneration(config)


def save_tiny(folder, seed=0, dev=False) -> Path:
    """Write a whole klein (or dev) pipeline folder, the same for the same seed; return the folder."""
    torch.manual_seed(seed)
    tokenizer, text_encoder = _mistral() if dev else _qwen()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=dev,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = (Flux2Pipeline if dev else Flux2KleinPipeline)(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )
    pipeline.save_pretrained(folder)
    return Path(folder)
