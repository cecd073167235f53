"""Trains the tokenizer on the prompts of the picture world: python -m danceopd.world.build_tokenizer."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from danceopd.world.edits import KINDS, sample_edits
from danceopd.world.prompts import draw, draw_tasks, sample_prompts
from danceopd.world.tokenizer import PATH


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    corpus = []
    for style in (0, 1):
        prompts, _ = sample_prompts(draw_tasks(5000, None, generator), generator, style=style)
        corpus += [prompt.text for prompt in prompts]
    edits, _, _ = sample_edits(draw(5000, len(KINDS), generator), generator)
    corpus += [edit.text for edit in edits]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(PATH))


if __name__ == "__main__":
    main()
