"""Prompts that are said to be cut are those of which the encoder does not see the end."""

import pytest
import tiny_flux
import tiny_flux2
import tiny_qwen_image
import tiny_sd3
import tiny_z_image

from danceopd.data.prompt_limits import look_at_prompts, prompt_notes
from danceopd.models.backbones import backbone_of

MODELS = {
    "sd3": tiny_sd3.save_tiny,
    "flux": tiny_flux.save_tiny,
    "klein": tiny_flux2.save_tiny,
    "flux2": lambda folder: tiny_flux2.save_tiny(folder, dev=True),
    "qwen": tiny_qwen_image.save_tiny,
    "z": tiny_z_image.save_tiny,
    "z_omni": tiny_z_image.save_tiny_omni,
}
AFTER = 80  # letters that the templates put behind a prompt at most, where a letter is a token


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_cut_where_its_end_makes_no_difference(tmp_path, name):
    model = MODELS[name](tmp_path)
    backbone = backbone_of(model)
    limit = max(reader.limit for reader in backbone.prompt_readers(model, backbone.MAX_SEQUENCE_LENGTH))
    prompts = ["ab" * (n // 2) + "c" * (n % 2) for n in range(limit + 5)]
    found, limits = look_at_prompts(backbone, model, prompts, backbone.MAX_SEQUENCE_LENGTH)
    everywhere = [prompt for prompt in prompts if len(found.get(prompt, {}).get("cut", ())) == len(limits)]
    fits = len(everywhere[0]) - 1
    encode = backbone.text_encoder(model)

    def differ(length):
        one, two = (encode(["a" * (length - 1) + end]) for end in "bc")
        return any(one[key].shape != two[key].shape or not one[key].equal(two[key]) for key in one)

    assert prompts[-1] in everywhere
    assert differ(fits)
    assert not differ(fits + 1 + AFTER)


def test_an_encoder_that_does_not_cut(tmp_path):
    model = tiny_qwen_image.save_tiny(tmp_path, edit=True)
    found, limits = look_at_prompts(backbone_of(model), model, ["a" * 3000, "<|image_pad|> and <|im_end|>"], 512)
    assert (found, limits) == ({"<|image_pad|> and <|im_end|>": {"special": ["<|image_pad|>", "<|im_end|>"]}}, {})


def test_what_is_said_of_rows(tmp_path):
    model = tiny_sd3.save_tiny(tmp_path)
    prompts = ["a cup!", "a" * 100, "b" * 400, "a </s> cup"]
    found, limits = look_at_prompts(backbone_of(model), model, prompts, backbone_of(model).MAX_SEQUENCE_LENGTH)
    rows = [{"id": f"row{i}", **found.get(prompt, {})} for i, prompt in enumerate(prompts)]
    assert prompt_notes(rows, limits) == [
        "of 4 prompts 2 are longer than the 77 tokens of tokenizer and cut there: row1, row2",
        "of 4 prompts 2 are longer than the 77 tokens of tokenizer_2 and cut there: row1, row2",
        "of 4 prompts 1 is longer than the 256 tokens of tokenizer_3 and cut there: row2",
        "of 4 prompts 1 holds special tokens, read as such and not as text (</s>): row3",
    ]
    assert prompt_notes(rows[:1], limits) == []
