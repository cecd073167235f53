"""Every text of the picture world has its own tokens."""

import itertools

import torch
from scenes import (
    generator,
)

from danceopd.world.dit import DiTConfig
from danceopd.world.edits import sample_edits
from danceopd.world.prompts import (
    PAIR_TASKS,
    TASKS,
    sample_prompts,
)
from danceopd.world.sprites import CLASSES, COLORS
from danceopd.world.tokenizer import load_tokenizer, tokenize


def a(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def every_text() -> list[str]:
    """Every prompt and instruction that the world can utter, written out independently of its sampler."""
    tinted = list(itertools.product(COLORS[1:], CLASSES))
    two = list(itertools.permutations(CLASSES, 2))
    words = [a(c) for c in CLASSES]
    words += [f"{a(x)} and {a(y)}" for x, y in two]
    words += [f"{n} {c}s" for n in ("two", "three", "four") for c in CLASSES]
    words += [a(f"{k} {c}") for k, c in tinted]
    words += [f"{a(x)} {r} {a(y)}" for x, y in two for r in ("left of", "right of", "above", "below")]
    words += [
        f"{a(f'{k} {c}')} and {a(f'{l} {d}')}"
        for (k, c), (l, d) in itertools.product(tinted, tinted)  # noqa: E741
        if c != d and k != l
    ]
    texts = [f"a {lead} of {w}" for lead in ("photo", "sketch") for w in words]
    things = [a(c) for c in CLASSES] + [a(f"{k} {c}") for k, c in tinted]
    texts += [f"add {t}" for t in things]
    texts += [f"remove the {c}" for c in CLASSES]
    texts += [f"replace the {c} with {t}" for c in CLASSES for t in things if not t.endswith(f" {c}")]
    texts += [f"make the {c} {k}" for k, c in tinted]
    texts += [f"change the background to {b}" for b in ("snow", "sand", "sky", "night")]
    return [*texts, "turn it into a photo", "turn it into a sketch"]


def test_sampled_texts_are_among_all_texts():
    known, seen = set(every_text()), set()
    for split, style in itertools.product(("seen", "held_out"), (0, 1)):
        tasks = torch.tensor([TASKS.index(t) for t in (TASKS if split == "seen" else PAIR_TASKS)]).repeat(300)
        seen |= {p.text for p in sample_prompts(tasks, generator(), split=split, style=style)[0]}
        seen |= {e.text for e in sample_edits(torch.arange(900) % 6, generator(), split=split)[0]}
    assert seen <= known


def test_every_text_has_its_own_tokens_and_none_is_cut():
    texts, length = every_text(), DiTConfig().text_length
    assert len(set(texts)) == len(texts)
    encoded = [tuple(e.ids) for e in load_tokenizer().encode_batch(texts)]
    assert max(map(len, encoded)) <= length == 10
    assert len(set(encoded)) == len(texts)
    tokens = tokenize(texts, length)
    assert tokens.unique(dim=0).shape == (len(texts), length)
    assert tokens.max() < DiTConfig().vocab_size
    assert load_tokenizer().decode(encoded[-1]).strip() == texts[-1]


def test_tokens_of_any_text():
    length, pad = 10, load_tokenizer().token_to_id("<pad>")
    tokens = tokenize(["", "a photo of a dog", "Ein Größenvergleich: zebra ☂ 12345" * 5], length)
    assert tokens.shape == (3, length)
    assert tokens.dtype == torch.int64
    assert (tokens[0] == pad).all()
    assert (tokens[1] != pad).any()
    assert (tokens[1] == pad).any()
    assert (tokens[2] != pad).all()
    assert load_tokenizer().get_vocab_size() <= DiTConfig().vocab_size
    assert tokenize([], length).shape == (0, length)
