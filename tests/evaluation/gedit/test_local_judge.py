"""A judge on this machine, of the real classes, tiny and random."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny_qwen_image
import torch
from judge_server import edits
from PIL import Image

from danceopd.evaluation.gedit import judge as judge_module
from danceopd.evaluation.gedit.judge import (
    Question,
    judge_edits,
)
from danceopd.evaluation.gedit.local_judge import LocalJudge
from danceopd.support.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


ANSWERED = "score=[7,6]"


def save_judge(path, answering: bool) -> Path:
    """A tiny random Qwen2.5-VL of the real classes; answering: whatever it is asked, it gives one answer and ends."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():  # as in tiny_qwen_image: no picture needs the part that reads films
        Qwen2_5_VLProcessor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])
    torch.manual_seed(0)
    tokenizer = tiny_qwen_image.tiny_tokenizer()
    model = tiny_qwen_image.tiny_text_encoder(tokenizer)
    if answering:  # each token is followed by the one that its own embedding, which nothing is added to, points at
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.data.zero_()
            layer.mlp.down_proj.weight.data.zero_()
        said = tokenizer("\n" + ANSWERED + "<|im_end|>")["input_ids"]
        embeds = model.get_input_embeddings().weight.data
        head = torch.zeros_like(embeds)
        for token, following in pairwise(said):
            head[following] = 10 * torch.nn.functional.normalize(embeds[token], dim=0)
        model.lm_head.weight.data = head
    readers = {"image_processor": Qwen2VLImageProcessor(max_pixels=56 * 56), "tokenizer": tokenizer}
    if is_torchvision_available():
        readers["video_processor"] = Qwen2VLVideoProcessor()
    Qwen2_5_VLProcessor(**readers, chat_template=TEMPLATE).save_pretrained(path)
    model.save_pretrained(path)
    return path


def test_a_local_model_judges_and_is_not_asked_twice(tmp_path):
    judge = LocalJudge(save_judge(tmp_path / "judge", answering=True), batch_size=2)
    assert [verdict.sc_marks for verdict in judge_edits(edits(3), judge, tmp_path / "cache")] == [(7, 6)] * 3
    again = LocalJudge(tmp_path / "judge")
    assert [verdict.pq for verdict in judge_edits(edits(3), again, tmp_path / "cache")] == [6] * 3
    assert "_model" not in vars(again)  # not even loaded


def test_a_local_model_answers_a_batch_as_it_answers_each_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_module, "ANSWER_TOKENS", 8)
    judge = LocalJudge(save_judge(tmp_path, answering=False))
    rng = np.random.default_rng(0)
    noisy = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((30, 60), (60, 30), (40, 40))
    ]
    questions = [
        Question("Is it good?", (noisy[0],)),
        Question("Is it good?", (noisy[1],)),
        Question("What is changed, and what is not?", (noisy[2], noisy[0])),
    ]
    together = judge(questions)
    assert together == [judge([question])[0] for question in questions]
    assert len(set(together)) == 3


def test_a_local_folder_of_no_use(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        LocalJudge(tmp_path / "nowhere")
    folder = save_judge(tmp_path / "judge", answering=False)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="no safetensors"):
        LocalJudge(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        LocalJudge(folder)
