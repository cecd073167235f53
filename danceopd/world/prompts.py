"""Draws text-to-image prompts with GenEval's six tasks and grammar, and the scenes that they describe."""

import itertools
from dataclasses import dataclass

import torch

from danceopd.world.scene import CELLS, Scene, blank
from danceopd.world.sprites import BACKGROUNDS, CLASSES, COLORS, EMPTY, JITTER, NATURAL

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

PAIR_TASKS = ("two_object", "colors", "position", "color_attr")  # those that a held-out pair can appear in

RELATIONS = ("left of", "right of", "above", "below")

NUMBERS = {2: "two", 3: "three", 4: "four"}

# Never seen in any training picture: each class lacks one colour, and six pairs of classes never meet.
HELD_OUT_COLORS = frozenset((name, COLORS[1 + index % (len(COLORS) - 1)]) for index, name in enumerate(CLASSES))

HELD_OUT_PAIRS = frozenset(
    frozenset(pair)
    for pair in (
        ("dog", "boat"),
        ("cat", "airplane"),
        ("car", "cup"),
        ("apple", "clock"),
        ("dog", "clock"),
        ("cat", "boat"),
    )
)

SPLITS = ("seen", "held_out")


@dataclass(frozen=True)
class Prompt:
    """One text-to-image prompt and what must be in the picture.

    Attributes:
        text, task: Of the prompt.
        objects: Class and colour indices of what is named, in order.
        count: How many of the first.
        relation: Index into RELATIONS of the first to the second, or -1.
    """

    text: str
    task: str
    objects: tuple[tuple[int, int], ...]
    count: int = 1
    relation: int = -1


def with_article(words: str) -> str:
    """Puts "a" or "an" before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(cls: int, color: int) -> str:
    """Writes "a red car", "an apple"."""
    name = CLASSES[cls]
    return with_article(name if color == NATURAL else f"{COLORS[color]} {name}")


def colored(split: str) -> torch.Tensor:
    """Returns [N, 2] class and colour (never natural) indices of the split."""
    pairs = itertools.product(range(len(CLASSES)), range(1, len(COLORS)))
    keep = [(c, k) for c, k in pairs if ((CLASSES[c], COLORS[k]) in HELD_OUT_COLORS) == (split == "held_out")]
    return torch.tensor(keep)


def groups(split: str, size: int) -> torch.Tensor:
    """Returns [N, size] ordered tuples of distinct classes: without any held-out pair, or with at least one."""
    keep = []
    for group in itertools.permutations(range(len(CLASSES)), size):
        pairs = (frozenset((CLASSES[a], CLASSES[b])) for a, b in itertools.combinations(group, 2))
        if any(pair in HELD_OUT_PAIRS for pair in pairs) == (split == "held_out"):
            keep.append(group)
    return torch.tensor(keep)


def draw(n: int, high: int, generator: torch.Generator) -> torch.Tensor:
    """Draws n uniform integers below `high`."""
    return torch.randint(high, (n,), generator=generator)


def draw_row(table: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Draws n uniform rows of a table."""
    return table[draw(n, len(table), generator)]


def draw_canvas(n: int, generator: torch.Generator) -> Scene:
    """Makes n empty pictures with a random background, and a random jitter waiting in every cell."""
    scene = blank(n, draw(n, len(BACKGROUNDS), generator))
    scene.jitter = torch.randint(len(JITTER), (n, CELLS), generator=generator)
    return scene


def draw_tasks(n: int, weights: dict[str, float] | None, generator: torch.Generator) -> torch.Tensor:
    """Draws n task indices, with the given weights (uniform without)."""
    share = torch.tensor([1.0 if weights is None else float(weights.get(task, 0.0)) for task in TASKS])
    return torch.multinomial(share, n, replacement=True, generator=generator)


# Long: everything is drawn in one order, on which the shipped networks' data depend.
def sample_prompts(
    tasks: torch.Tensor, generator: torch.Generator, *, split: str = "seen", style: int = 0
) -> tuple[list[Prompt], Scene]:
    """Draws one prompt and one matching scene for each task.

    Args:
        tasks: [B] int64, indices into TASKS.
        generator: Draws everything.
        split: "seen" or "held_out", for which only PAIR_TASKS are possible: the others name no pair.
        style: With 1 the prompt asks for a sketch and the scene is one.

    Returns:
        The prompts and the scenes.

    Raises:
        ValueError: A held-out task has no pairs.
    """
    n = len(tasks)
    if split == "held_out" and not all(TASKS[t] in PAIR_TASKS for t in set(tasks.tolist())):
        raise ValueError(f"held-out prompts exist for {', '.join(PAIR_TASKS)} only")
    single = draw(n, len(CLASSES), generator)
    pair = draw_row(groups(split, 2), n, generator)
    first = draw_row(colored(split), n, generator)
    second_table = colored(split)
    second = draw_row(second_table, n, generator)
    # Attribution needs two different classes and two different colours that may meet: redraw until so.
    meet = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.bool)
    for a, b in groups("seen", 2).tolist():
        meet[a, b] = True
    while (wrong := ~meet[first[:, 0], second[:, 0]] | (first[:, 1] == second[:, 1])).any():
        fresh = int(wrong.sum())
        second[wrong] = draw_row(second_table, fresh, generator)
        first[wrong] = draw_row(second_table, fresh, generator)
    count = 2 + draw(n, 3, generator)
    relation = draw(n, 4, generator)
    order = torch.rand(n, CELLS, generator=generator).argsort(-1)

    # Two cells in a relation share the row (left, right) or the column (above, below).
    line = draw(n, 2, generator)
    near = torch.where(relation < 2, 2 * line, line)
    far = near + torch.where(relation < 2, 1, 2)
    flip = (relation == 1) | (relation == 3)
    related = torch.stack([torch.where(flip, far, near), torch.where(flip, near, far)], -1)

    is_task = {name: tasks == i for i, name in enumerate(TASKS)}
    by_color = is_task["colors"] | is_task["color_attr"]
    by_pair = is_task["two_object"] | is_task["position"]
    a = torch.where(by_color, first[:, 0], torch.where(by_pair, pair[:, 0], single))
    a_color = torch.where(by_color, first[:, 1], NATURAL)
    b = torch.where(is_task["color_attr"], second[:, 0], pair[:, 1])
    b_color = torch.where(is_task["color_attr"], second[:, 1], NATURAL)
    has_b = by_pair | is_task["color_attr"]
    copies = torch.where(is_task["counting"], count, 1)

    cell = torch.where(is_task["position"][:, None], related, order[:, :2])
    scene = draw_canvas(n, generator)
    scene.style.fill_(style)
    # Position j of `order` gets a copy of the first object while j < copies.
    take_first = torch.zeros(n, CELLS, dtype=torch.bool)
    take_first.scatter_(1, order, torch.arange(CELLS)[None] < copies[:, None])
    take_first &= is_task["counting"][:, None]
    take_first.scatter_(1, cell[:, :1], ~is_task["counting"][:, None] | take_first.gather(1, cell[:, :1]))
    take_second = torch.zeros(n, CELLS, dtype=torch.bool)
    take_second.scatter_(1, cell[:, 1:], has_b[:, None])
    scene.objects = torch.where(take_first, a[:, None], torch.where(take_second, b[:, None], EMPTY))
    scene.colors = torch.where(take_first, a_color[:, None], torch.where(take_second, b_color[:, None], NATURAL))

    return _texts((tasks, a, a_color, b, b_color, copies, relation), style), scene


def _texts(columns: tuple[torch.Tensor, ...], style: int) -> list[Prompt]:
    """Writes prompts from [B] columns: task, first class and colour, second class and colour, number of the first, and
    the relation of the first to the second."""
    prompts = []
    lead = "a photo of" if style == 0 else "a sketch of"
    for task, a_, ak, b_, bk, copies_, rel in zip(*(c.tolist() for c in columns), strict=True):
        name = TASKS[task]
        objects = ((a_, ak), (b_, bk)) if name in ("two_object", "position", "color_attr") else ((a_, ak),)
        if name == "counting":
            words = f"{NUMBERS[copies_]} {CLASSES[a_]}s"
        elif name == "position":
            words = f"{describe(a_, ak)} {RELATIONS[rel]} {describe(b_, bk)}"
        else:
            words = " and ".join(describe(*item) for item in objects)
        rel = rel if name == "position" else -1
        prompts.append(Prompt(f"{lead} {words}", name, objects, copies_, rel))
    return prompts
