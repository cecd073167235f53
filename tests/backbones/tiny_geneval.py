"""Tiny random evaluators of the real classes, as folders of save_pretrained, and folders in GenEval's layout."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_sd3 import _clip_tokenizer, _clip_vocabulary
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from danceopd.evaluation.geneval.rules import CLASSES

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def save_detector(folder: Path, labels=CLASSES, seed: int = 0) -> Path:
    """A Mask2Former on a Swin backbone that is sure of what it sees, whatever that is."""
    torch.manual_seed(seed)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        initializer_range=0.5,
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=8,
        id2label=dict(enumerate(labels)),
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(80)
        embedder = model.model.transformer_module.decoder.mask_predictor.mask_embedder
        [part for part in embedder.modules() if isinstance(part, torch.nn.Linear)][-1].weight.mul_(100)
    model.save_pretrained(folder)
    processor = {"image_processor_type": "Mask2FormerImageProcessor", "image_mean": MEAN, "image_std": STD}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))
    return Path(folder)


def save_clip(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    size = len(_clip_vocabulary())
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "initializer_factor": 3.0}
    config = CLIPConfig(
        text_config=text,
        vision_config={**sizes, "image_size": 32, "patch_size": 8, "initializer_factor": 3.0},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    _clip_tokenizer(Path(folder)).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))
    return Path(folder)


def picture(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Coloured blocks."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height), Image.NEAREST)


def line(prompt: str = "a photo of a dog", tag: str = "single_object", *include: dict, **more) -> dict:
    return {"tag": tag, "include": list(include) or [{"class": "dog", "count": 1}], "prompt": prompt, **more}


def save_pictures(folder: Path, metadata: list[dict], samples: int = 2, name: str = "{:04d}.png") -> Path:
    """Pictures of every prompt in the benchmark's layout, as another tool would draw them."""
    for index, prompt in enumerate(metadata):
        place = Path(folder) / f"{index:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps(prompt))
        for number in range(samples):
            picture(7 * index + number).save(place / "samples" / name.format(number))
    return Path(folder)
