"""The sizes of the released transformers that configs/models is for, and of what they read."""

import torch

# By the beginning of a name in configs/models: the tiny family that stands for it; the released transformer's
# configuration, from diffusers' defaults and from memory of the released config.json; its parameters in billions
# (SD3.5-medium's 2.5 B by name include its table of positions, a buffer).
DUAL = {"dual_attention_layers": list(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384}
SD35 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "sample_size": 128}
KLEIN = {"guidance_embeds": False}
LONGCAT = {"num_layers": 10, "num_single_layers": 20}
MODELS = {
    "sd3.5-medium": ("sd3", {**SD35, **DUAL, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}, 2.24),
    "flux.1-dev": ("flux", {"guidance_embeds": True}, 11.9),
    "flux.1-kontext-dev": ("kontext", {"guidance_embeds": True}, 11.9),
    "flux.2-klein-4b": (
        "klein",
        {**KLEIN, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        3.9,
    ),
    "flux.2-klein-9b": (
        "klein",
        {**KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        9.1,
    ),
    "flux.2-dev": ("flux2", {}, 32.2),
    "flux.3": ("flux3", {}, 5.54),
    "qwen-image-edit-2509": ("qwen_edit", {}, 20.4),
    "qwen-image-edit-2511": ("qwen_edit", {"zero_cond_t": True}, 20.4),
    "qwen-image-2512": ("qwen", {}, 20.4),
    "qwen-image-2.1": ("qwen_21", {}, 7.1),
    "qwen-image": ("qwen", {}, 20.4),
    "z-image": ("z", {}, 6.15),
    "longcat-image-edit": ("longcat_edit", LONGCAT, 6.3),
    "longcat-image": ("longcat", LONGCAT, 6.3),
    "krea-2": ("krea2", {}, 12.9),
    "prx": ("prx", {}, 1.17),
    "dreamlite": ("dreamlite", None, None),  # the released configuration is not known here
}
CLASSES = {  # of diffusers, by family
    "sd3": "SD3Transformer2DModel",
    "flux": "FluxTransformer2DModel",
    "kontext": "FluxTransformer2DModel",
    "klein": "Flux2Transformer2DModel",
    "flux2": "Flux2Transformer2DModel",
    "qwen": "QwenImageTransformer2DModel",
    "qwen_edit": "QwenImageTransformer2DModel",
    "z": "ZImageTransformer2DModel",
    "qwen_21": "QwenImage21Transformer2DModel",
    "longcat": "LongCatImageTransformer2DModel",
    "longcat_edit": "LongCatImageTransformer2DModel",
    "krea2": "Krea2Transformer2DModel",
    "flux3": "Flux3Transformer2DModel",
    "prx": "PRXTransformer2DModel",
}

# A transformer's name of its prompts' width, by family.
WIDTHS = ("cap_feat_dim", "joint_attention_dim", "context_in_dim", "text_hidden_dim", "encoder_hid_dim")

PROMPT = {"sd3": 333}  # tokens that the pipelines give at most, 512 where nothing is said


def prompt_of(family: str, transformer, length: int = 24, slots: int = 0) -> dict[str, torch.Tensor]:
    """One sample's encoding, of the shapes that the family's text encoders give; slots: places of a source picture."""
    sizes = transformer.config
    width = next(getattr(sizes, name) for name in WIDTHS if hasattr(sizes, name))
    layers = [sizes.num_text_layers] if family == "krea2" else []
    prompt = {"prompt_embeds": torch.randn(length, *layers, width)}
    if family in ("sd3", "flux", "kontext"):
        prompt["pooled_prompt_embeds"] = torch.randn(sizes.pooled_projection_dim)
    if family in ("qwen", "qwen_edit", "z", "qwen_21", "longcat_edit", "krea2", "prx", "dreamlite", "flux3"):
        prompt["prompt_mask"] = torch.ones(length, dtype=torch.bool)
    if family in ("qwen_21", "longcat_edit"):
        prompt["prompt_parts"] = torch.tensor([slots, length - slots])
    if family == "z_omni":  # parts before, between and after the pictures, and one for the picture to be made
        prompt["prompt_parts"] = torch.tensor([length - 2, 1, 1] if slots else [length])
        if slots:
            prompt["siglip_embeds"] = torch.randn(1, slots, sizes.siglip_feat_dim)
            prompt["siglip_shapes"] = torch.tensor([[1, slots]])
    if family == "flux3":
        prompt["prompt_parts"] = torch.tensor([length])
    if family == "qwen_21":
        prompt["prompt_slots"] = torch.arange(length) < slots
    return prompt
