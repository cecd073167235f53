"""One check of everything on a card, in a bounded time: `python -m benchmarks.card --budget 600 --out FOLDER`.

It needs torch and triton alone, and what else is installed it uses. It runs on a CPU too, at small sizes: a rehearsal,
whose figures say nothing about a card.
"""
