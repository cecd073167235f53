"""Asks a judge that runs in this process."""

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from danceopd.evaluation.gedit.judge import ANSWER_TOKENS, Question
from danceopd.support.errors import UserError


class LocalJudge:
    """A vision-language model of transformers, such as Qwen2.5-VL: judge(questions) -> its most likely answers.

    It is loaded when it is asked first, since the model that edits may need the memory before.

    Args:
        folder: Of the model.
        device, dtype: Of its weights.
        batch_size: Edits at a time, each of two questions.

    Raises:
        UserError: The folder is missing or incomplete.
    """

    parallel = 1

    def __init__(self, folder: Path, device="cpu", dtype=None, batch_size: int = 4) -> None:
        from transformers import AutoProcessor
        from transformers.utils import is_torchvision_available

        from danceopd.models import loading
        from danceopd.models.fingerprint import identity

        self._folder, self._device, self._dtype = Path(folder), device, dtype
        try:
            self._processor = loading.load(AutoProcessor, folder)
        except UserError as error:
            if self._folder.is_dir() and not is_torchvision_available():  # transformers names a missing file instead
                raise UserError(f"{error}; Qwen2.5-VL's processor needs torchvision: pip install torchvision") from None
            raise
        self._processor.tokenizer.padding_side = "left"  # such that all answers of a batch begin at one place
        if not any(self._folder.glob("*.safetensors")):
            raise UserError(f"no safetensors in {folder}; give the folder of a whole vision-language model")
        self.name, self.batch_size, self.stop = identity(self._folder), batch_size, threading.Event()

    @cached_property
    def _model(self):
        import torch
        from transformers import AutoModelForImageTextToText

        from danceopd.models import loading

        return loading.load_model(AutoModelForImageTextToText, self._folder, self._dtype or torch.float32).to(
            self._device
        )

    def check(self) -> None:
        """Does nothing: what there was to check, its making has checked."""

    def __call__(self, questions: Sequence[Question]) -> list[str]:
        import torch

        texts, pictures = [], [list(question.pictures) for question in questions]
        for question in questions:
            content = [{"type": "image"} for _ in question.pictures] + [{"type": "text", "text": question.text}]
            message = [{"role": "user", "content": content}]
            texts.append(self._processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        inputs = self._processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            output = self._model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        answers = output[:, inputs["input_ids"].shape[1] :]
        return self._processor.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
