"""Tiny random Qwen3-VL encoders of the real classes, for the families that read prompts with them."""

from tiny_qwen_image import SPECIAL
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.utils import is_torchvision_available

if not is_torchvision_available():
    # transformers wants torchvision for the part of this processor that reads films, and loads none of it without.
    # No picture needs that part: where torchvision is missing, the tests go without it.
    Qwen3VLProcessor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def tiny_config(tokenizer: Qwen2Tokenizer, layers: int = 2) -> Qwen3VLConfig:
    """Qwen3-VL of width 16 with two layers for pictures."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "initializer_range": 0.2,  # at the default of 0.02 so small a network hardly mixes its tokens
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def tiny_reader(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    """The whole model."""
    return Qwen3VLForConditionalGeneration(tiny_config(tokenizer))


def tiny_body(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3VLModel:
    """The model without its language head."""
    return Qwen3VLModel(tiny_config(tokenizer, layers))


def tiny_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """What shows pictures to it: a token for 32 x 32 pixels, no picture resized."""
    readers = {
        "image_processor": Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 1024, "longest_edge": 2**24}),
        "tokenizer": tokenizer,
    }
    if is_torchvision_available():
        readers["video_processor"] = Qwen3VLVideoProcessor()
    return Qwen3VLProcessor(**readers, chat_template=TEMPLATE)
