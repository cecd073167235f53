"""GenEval's evaluators: a detector and a classifier of colours, tiny and random, of the real classes."""

import shutil

import numpy as np
import pytest
import tiny_geneval as tiny
import torch
from geneval_runs import box, found
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from danceopd.evaluation.geneval import models as geneval_models
from danceopd.evaluation.geneval.models import crop, detector_input, load_colors, load_detector, objects_of
from danceopd.evaluation.geneval.rules import CLASSES, COLORS, Found
from danceopd.support.errors import UserError


def alike(a, b):
    return (
        a.keys() == b.keys()
        and all([one.box for one in a[name]] == [one.box for one in b[name]] for name in a)
        and all(
            np.array_equal(one.mask, other.mask) and one.confidence == pytest.approx(other.confidence, abs=1e-4)
            for name in a
            for one, other in zip(a[name], b[name], strict=True)
        )
    )


def test_the_detector_finds_the_same_in_a_batch_as_alone(evaluators, small):
    detect = load_detector(evaluators[0], "cpu", {"dog"})
    pictures = [tiny.picture(0), tiny.picture(1), tiny.picture(2, 120, 80), tiny.picture(3)]
    together = detect(pictures)
    assert all(alike(a, detect([p])[0]) for a, p in zip(together, pictures, strict=True))
    assert sum(len(objects) for one in together for objects in one.values()) >= 4
    assert not alike(together[0], together[1]), "a picture does not matter"
    for one, picture in zip(together, pictures, strict=True):
        for name, objects in one.items():
            assert name in CLASSES
            for there in objects:
                x0, y0, x1, y1 = (int(x) for x in there.box)
                assert there.mask.shape == picture.size[::-1]
                outside = there.mask.copy()
                outside[y0:y1, x0:x1] = False
                assert not outside.any()
                assert there.mask[y0].any()
                assert there.mask[y1 - 1].any()
                assert 0.3 < there.confidence <= 1


def test_a_picture_is_fitted_to_800_by_1333_and_filled_up_with_grey():
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (tiny.MEAN, tiny.STD))
    for (width, height), size, padded in (
        ((1024, 1024), (800, 800), (800, 800)),
        ((100, 200), (1333, 667), (1344, 672)),
        ((640, 480), (800, 1067), (800, 1088)),
    ):
        pixels, inside = detector_input([tiny.picture(0, width, height)], mean, std, "cpu")
        assert (inside, tuple(pixels.shape)) == (size, (1, 3, *padded))
        grey = (128 / 255 - mean) / std
        assert torch.allclose(pixels[0, :, size[0] :], grey.expand(3, padded[0] - size[0], padded[1]))
        assert torch.allclose(pixels[0, :, :, size[1] :], grey.expand(3, padded[0], padded[1] - size[1]))
    whole = tiny.picture(1, 800, 800)  # of its size already: the pixels themselves
    pixels, _ = detector_input([whole], mean, std, "cpu")
    assert torch.equal((pixels[0] * std + mean).mul(255).round().permute(1, 2, 0).byte(), torch.tensor(np.array(whole)))


def logits(*rows):
    """[Q, 3]: class probabilities of two classes and of none."""
    return torch.log(torch.tensor(rows))


def test_detections_come_from_logits_as_mask2former_infers_them():
    labels, size = ["dog", "curtain"], (8, 8)
    masks = torch.full((3, 8, 8), -4.0)
    masks[0, 2:5, 1:4] = 3.0
    masks[0, 7, 7] = 1e-4  # barely positive counts
    masks[1, :, :] = 2.0
    masks[2, 0, 0] = 9.0
    objects = objects_of(logits([0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.25, 0.1, 0.65]), masks, size, size, size, labels)
    assert objects.keys() == {"dog"}, "what COCO calls stuff, and what is unlikely, is left out"
    (one,) = objects["dog"]
    assert one.box == (1, 2, 8, 8)
    assert one.mask.sum() == 10
    inside = torch.tensor([3.0] * 9 + [1e-4]).sigmoid().mean()
    assert one.confidence == pytest.approx(0.8 * float(inside), abs=1e-5)


@pytest.mark.parametrize(("probability", "there"), [(0.299, False), (0.301, True)])
def test_the_class_times_the_mask_must_be_above_the_confidence(probability, there):
    sure, unsure = torch.full((1, 4, 4), 50.0), torch.full((1, 4, 4), 1e-3)
    row = logits([probability, 0.0, 1 - probability])
    args = ((4, 4), (4, 4), (4, 4), ["dog", "cat"])
    assert bool(objects_of(row, sure, *args)) is there
    assert not objects_of(row, unsure, *args), "its mask is half sure"
    assert not objects_of(logits([0.9, 0.0, 0.1]), -sure, *args), "no pixel is its"


def test_one_query_may_be_two_objects_and_padding_is_cut_off():
    mask = torch.full((1, 8, 8), -5.0)
    mask[:, :, 4:] = 5.0
    objects = objects_of(logits([0.48, 0.47, 0.05]), mask, (8, 8), (8, 6), (16, 12), ["dog", "cat"])
    assert {name: one[0].box for name, one in objects.items()} == {"dog": (8, 0, 12, 16), "cat": (8, 0, 12, 16)}


def test_other_names_of_cocos_classes_are_known(tmp_path):
    named = {v: k for k, v in geneval_models.NAMES.items()}
    folder = tiny.save_detector(tmp_path / "d", [named.get(name, name) for name in CLASSES])
    (found,) = load_detector(folder, "cpu", set(CLASSES))([Image.new("RGB", (32, 32))])
    assert found.keys() <= set(CLASSES)


def test_folders_that_are_no_detector_are_said(tmp_path, evaluators):
    with pytest.raises(UserError, match="there is no folder"):
        load_detector(tmp_path / "nothing", "cpu", {"dog"})
    with pytest.raises(UserError, match="no Mask2Former"):
        load_detector(evaluators[1], "cpu", {"dog"})
    other = tiny.save_detector(tmp_path / "ade", [f"wall {i}" for i in range(80)])
    with pytest.raises(UserError, match=r"does not know dog, tv remote: its id2label begins wall 0.*COCO"):
        load_detector(other, "cpu", {"dog", "tv remote"})
    coco = tmp_path / "coco"
    shutil.copytree(evaluators[0], coco)
    (coco / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="no image_mean"):
        load_detector(coco, "cpu", {"dog"})
    with pytest.raises(UserError, match="is no CLIP"):
        load_colors(evaluators[0], "cpu")
    clip = shutil.copytree(evaluators[1], tmp_path / "clip")
    torch.save({}, clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_colors(clip, "cpu")


def test_the_background_of_an_object_is_painted_and_its_box_cut_out():
    picture, mask = Image.new("RGB", (20, 10), "#f00"), np.zeros((10, 20), bool)
    mask[2:6, 3:9] = True
    mask[2, 3] = False
    cut = crop(picture, Found((3.0, 2.0, 9.0, 6.0), 0.9, mask))
    assert cut.size == (6, 4)
    assert cut.getpixel((0, 0)) == (153, 153, 153)
    assert cut.getpixel((1, 0)) == (255, 0, 0)
    assert crop(picture, Found((3.0, 2.0, 9.0, 6.0), 0.9)).getpixel((0, 0)) == (255, 0, 0)


def test_colors_are_the_nearest_mean_of_three_prompts_in_a_batch_as_alone(evaluators):
    name_colors = load_colors(evaluators[1], "cpu")
    picture, objects = tiny.picture(5), found(*(box(4 * i, 2 * i, 12, 20) for i in range(18)))
    together = name_colors(picture, "cup", objects)
    assert together == [name_colors(picture, "cup", [one])[0] for one in objects]
    assert len(set(together)) > 1
    # By the whole model, a prompt at a time.
    model, tokenizer = CLIPModel.from_pretrained(evaluators[1]), AutoTokenizer.from_pretrained(evaluators[1])
    shown = np.asarray(crop(picture, objects[3]).resize((32, 53), Image.BICUBIC))[10:42] / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.tensor((shown - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
    scores = {}
    for color in COLORS:
        texts = [f"a photo of a {color} cup", f"a photo of a {color}-colored cup", f"a photo of a {color} object"]
        with torch.no_grad():
            out = [model(**tokenizer(text, return_tensors="pt"), pixel_values=pixels) for text in texts]
        direction = torch.cat([one.text_embeds for one in out]).mean(0)  # of unit length each
        scores[color] = float(out[0].image_embeds[0] @ direction / direction.norm())
    assert together[3] == max(scores, key=scores.get)
