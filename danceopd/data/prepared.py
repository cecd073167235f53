"""Samples whose prompts and pictures were encoded before (danceopd.data.prepare): training reads nothing else."""

import copy
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from danceopd.core.conditioning import Conditioning, concatenate
from danceopd.data.cache import Cache
from danceopd.data.manifest import no_rows
from danceopd.data.prompt_limits import prompt_notes
from danceopd.support.errors import UserError
from danceopd.support.paths import near_path
from danceopd.support.texts import columns_of, lines_of, many, parse_json, read_text

Size = tuple[int, int]  # (height, width) in pixels

Kind = tuple[Size, tuple[Size, ...]]  # of a row: its picture's size, and those of its source pictures in their order


class PreparedFile:
    """The file that `danceopd data prepare` wrote into its cache, read once for all capabilities.

    Args:
        path: The file.

    Attributes:
        path: The file.
        cache: What its rows name.
        head: What it says of all rows.
        rows: The rows of each capability.

    Raises:
        UserError: The file is of no use.
    """

    def __init__(self, path: Path | str):
        self.path, self.cache = Path(path), Cache(Path(path).parent)
        self.head, self.rows = _read_rows(self.path)


class PreparedData:
    """The rows of one capability, of a file that `danceopd data prepare` wrote into its cache.

    Args:
        file: The file, or its path.
        capability: The rows' name in it.

    Attributes:
        kinds: Number of rows of each Kind.
        has_source: Whether the rows have source pictures.
        has_target: Whether all of them have the picture asked for.
        texts: What samples are given encodings of beside their prompts; none at first.

    Raises:
        UserError: The file is of no use, has no rows of the capability, or only some of them have source pictures.
    """

    def __init__(self, file: PreparedFile | Path | str, capability: str):
        file = file if isinstance(file, PreparedFile) else PreparedFile(file)
        self.path, self.capability, self.cache, self.head = file.path, capability, file.cache, file.head
        self.rows = file.rows.get(capability, [])
        self._all = self.rows  # a part has some of them
        self._by_kind: dict[Kind, list[dict]] = {}
        for row in self.rows:
            self._by_kind.setdefault(_kind(row), []).append(row)
        if not self.rows:
            raise UserError(no_rows(self.path, capability, file.rows))
        self.kinds = Counter({kind: len(rows) for kind, rows in self._by_kind.items()})
        without = sum(count for (_, sources), count in self.kinds.items() if not sources)
        if 0 < without < len(self.rows):
            raise UserError(
                f"{self.path}: {without} of {len(self.rows)} rows of {capability!r} have no source picture; "
                "give all of them some, or none"
            )
        self.has_source = not without
        self.has_target = all(row["target"] is not None for row in self.rows)
        self.texts: tuple[str, ...] = ()
        self._check_cache()

    def __len__(self) -> int:
        return len(self.rows)

    def own(self, kind: Kind) -> Kind:
        """Returns the Kind of these rows that may stand in a batch of a kind: without sources, of its size alone."""
        return kind if self.has_source else (kind[0], ())

    def part(self, kind: Kind) -> "PreparedData":
        """Returns the rows of one kind, on the same cache."""
        part = copy.copy(self)
        part.rows = self._by_kind[kind]
        part.kinds = Counter({kind: len(part.rows)})
        part._by_kind = {kind: part.rows}
        part.has_target = all(row["target"] is not None for row in part.rows)
        return part

    def check_texts(self, texts: Sequence[str]) -> None:
        """Checks that texts were prepared which sources are asked with in the place of prompts.

        Args:
            texts: As `danceopd data prepare` was given them.

        Raises:
            UserError: They were not; with the command that prepares them.
        """
        there = {**self.head["negative_prompts"], **self.rows[0].get("negative_prompts", {})}
        lacking = [text for text in texts if text not in there]
        if lacking:
            raise UserError(
                f"{self.path} has no encoding of {', '.join(map(repr, lacking))}, with which sources are asked; run\n"
                f"    {self._command([*filter(None, there), *lacking])}"
            )

    def encoded(self, text: str) -> dict[str, torch.Tensor] | None:
        """Reads a text's encoding, of one sample without source pictures; None where each row has its own."""
        key = self.head["negative_prompts"].get(text)
        return None if key is None else self.cache.read(key)

    def _command(self, texts: list[str]) -> str:
        """Writes the command that prepares these rows with texts."""
        made_from, made_with = self.head.get("manifest", {}), self.head.get("made_with", {})
        words = ["danceopd", "data", "prepare", made_from.get("path", "MANIFEST"), "--model", self.head["model"]]
        words += ["--cache", str(self.path.parent)]
        for key, value in made_with.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        return shlex.join([*words, "--texts", *texts])

    def condition(self, indices: list[int], without_prompt: list[bool]) -> Conditioning:
        """Reads what the samples are conditioned on; those without a prompt get the empty one's encoding."""
        return concatenate([self._one(self.rows[i], empty) for i, empty in zip(indices, without_prompt, strict=True)])

    def targets(self, indices: list[int]) -> torch.Tensor | None:
        """Reads the latents [n, C, h, w] of the pictures asked for; None where rows have none."""
        if not self.has_target:
            return None
        return torch.stack([self.cache.read(self.rows[i]["target"])["latents"] for i in indices])

    def notes(self) -> list[str]:
        """Says what was changed or left out when the capability was prepared, a line each, none where nothing was."""
        lines = prompt_notes(self._all, self.head.get("prompt_limits", {}))
        if left_out := self.head.get("left_out"):
            lines.append(f"{self.path} was prepared without {many(left_out, 'row')} of its manifest")
        return lines

    def empty_prompt(self) -> dict[str, torch.Tensor]:
        """Reads the empty prompt's encoding, of one sample without source pictures."""
        return self.cache.read(self.head["negative_prompts"][""])

    def _one(self, row: dict, empty: bool) -> Conditioning:
        entries = {**self.head["negative_prompts"], **row.get("negative_prompts", {})}
        own = entries[""]
        prompt = self._prompt(own if empty else row["prompt"])
        sources = tuple(self.cache.read(key)["latents"][None] for key in row["sources"])
        conditioning = Conditioning(prompt, sources or None, torch.tensor([bool(sources)]))
        if self.head.get("prompts_see_pictures"):
            conditioning.empty_prompt = self._prompt(own)
        # Of texts that all rows share the source has the encoding. With its prompt a row leaves out what is made of it.
        ours = [text for text in self.texts if columns_of(text) or self.head.get("prompts_see_pictures")]
        named = {text: own if empty and columns_of(text) else entries[text] for text in ours}
        conditioning.texts = {text: self._prompt(key) for text, key in named.items()} or None
        return conditioning

    def _prompt(self, key: str) -> dict[str, torch.Tensor]:
        return {name: value[None] for name, value in self.cache.read(key).items()}

    def _check_cache(self) -> None:
        """Checks that every entry that a row names is there; whether it is whole shows when it is read."""
        named = {key for row in self.rows for key in (row["prompt"], row["target"], *row["sources"]) if key is not None}
        named |= {key for row in self.rows for key in row.get("negative_prompts", {}).values()}
        named |= set(self.head["negative_prompts"].values())
        missing = [key for key in named if key not in self.cache]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of its entries are not in the cache {self.path.parent}; "
                "run `danceopd data prepare` again"
            )
        for row in self.rows:
            for key in (*row["sources"], *([] if row["target"] is None else [row["target"]])):
                if "latents" not in self.cache.names(key):
                    raise UserError(
                        f"{self.path}: the entry {key} of row {row['id']} holds no latents of a picture; "
                        "run `danceopd data prepare` again"
                    )


def _read_rows(path: Path) -> tuple[dict, dict[str, list[dict]]]:
    """Reads what prepare wrote: the head, and the rows of each capability.

    A UserError names a line which is not as prepare writes them.
    """
    if not path.exists():
        raise UserError(f"no prepared rows at {path}{near_path(path) or '; make them by `danceopd data prepare`'}")
    again = "run `danceopd data prepare` again"
    head, rows = None, {}
    for number, line in lines_of(read_text(path, "file of prepared rows")):
        try:
            row = parse_json(line)
            (_check_head if head is None else _check_row)(row)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}, line {number}, is damaged or of an older version ({reason}); {again}") from None
        if head is None:
            head = row
        else:
            rows.setdefault(row["capability"], []).append(row)
    if head is None:
        raise UserError(f"{path} is empty; {again}")
    return head, rows


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _check_negative(prompts: object, with_empty: bool) -> None:
    good = isinstance(prompts, dict) and ("" in prompts or not with_empty) and _texts([*prompts.values()])
    _need(good, "negative_prompts is no list of entries by text, with the empty one's")


def _check_head(head: object) -> None:
    _need(isinstance(head, dict), "not a JSON object")
    _check_negative(head["negative_prompts"], with_empty=True)
    _need(isinstance(head["model"], str), "model is no text")
    for key in ("encoders", "prompt_limits", "made_with"):
        _need(isinstance(head.get(key, {}), dict), f"{key} is no JSON object")
    left_out = head.get("left_out", 0)
    _need(type(left_out) is int and left_out >= 0, "left_out is no number of rows")
    _need(type(head.get("prompts_see_pictures", False)) is bool, "prompts_see_pictures is neither true nor false")


def _check_row(row: object) -> None:
    _need(isinstance(row, dict), "not a JSON object")
    for key in ("id", "capability", "prompt"):
        _need(isinstance(row[key], str), f"{key} is no text")
    _need(row["target"] is None or isinstance(row["target"], str), "target is no text")
    _need(_texts(row["sources"]), "sources is no list of texts")
    sizes = row.get("source_sizes", [])
    _need(isinstance(sizes, list) and all(map(_is_size, sizes)), "source_sizes is no list of [height, width]")
    _need(len(row["sources"]) == len(sizes), f"row {row['id']} has {len(row['sources'])} sources of {len(sizes)} sizes")
    _need(_is_size(row["size"]), "size is not [height, width]")
    for key in ("cut", "special"):
        _need(_texts(row.get(key, [])), f"{key} is no list of texts")
    if "negative_prompts" in row:
        _check_negative(row["negative_prompts"], with_empty=False)


def _kind(row: dict) -> Kind:
    return tuple(row["size"]), tuple(map(tuple, row.get("source_sizes", [])))


@dataclass(frozen=True)
class Mixing:
    """How capabilities mix: rows of each kind of batch, and lines about rows that are in none of them."""

    rows: dict[Kind, float]
    never_drawn: list[str]


def mix(data: dict[str, PreparedData]) -> Mixing:
    """Finds the kinds of batches that can mix all capabilities.

    The rows of a batch have one picture size, and those with source pictures have as many of them, of the same sizes;
    rows without any go with whatever sources there are. A kind that a capability has no row for makes no batch: its
    rows are never drawn. Every row of a capability is drawn equally often where the others have rows of each kind in
    the same proportion; where they have fewer (more), its rows of that kind are drawn less (more) often than its rest.

    Args:
        data: The rows of each capability, by name.

    Returns:
        How many rows a kind adds, by which it is to be drawn: a row without sources that goes with several kinds counts
        once, shared out among them by their rows with sources. And lines about rows that are never drawn.

    Raises:
        UserError: There is no such kind.
    """
    editing = [rows for rows in data.values() if rows.has_source]
    drawing = [rows for rows in data.values() if not rows.has_source]
    candidates = {kind for rows in editing or drawing for kind in rows.kinds}
    kinds = sorted(kind for kind in candidates if all(rows.own(kind) in rows.kinds for rows in data.values()))
    if not kinds:
        found = "; ".join(f"{name} has {_named(rows.kinds)}" for name, rows in data.items())
        raise UserError(
            "no picture size is common to all capabilities (with the sizes of source pictures), so that no batch can "
            f"mix them: {found}"
        )
    edits = {kind: sum(rows.kinds[rows.own(kind)] for rows in editing) for kind in kinds}
    of_size = Counter()
    for kind in kinds:
        of_size[kind[0]] += edits[kind]

    def share(kind: Kind) -> float:
        return edits[kind] / of_size[kind[0]] if editing else 1.0

    weights = {kind: edits[kind] + share(kind) * sum(rows.kinds[rows.own(kind)] for rows in drawing) for kind in kinds}
    return Mixing(weights, [line for name in data for line in _never_drawn(name, data, kinds)])


def _never_drawn(name: str, data: dict[str, PreparedData], kinds: list[Kind]) -> list[str]:
    """Returns a line for each set of capabilities that keeps rows of one from being drawn."""
    own = data[name]
    drawn = {own.own(kind) for kind in kinds}
    left: Counter = Counter()
    for kind, count in own.kinds.items():
        if kind not in drawn:
            left[tuple(other for other, rows in data.items() if not _meet(kind, own, rows))] += count

    def reason(lacking: tuple[str, ...]) -> str:
        if not lacking:
            return "the others have no sizes of source pictures in common there"
        sources = own.has_source and any(data[other].has_source for other in lacking)
        return f"no rows of {' or '.join(lacking)} have their size" + (" and their sources'" if sources else "")

    return [f"{count} of {len(own)} rows of {name} are never drawn: {reason(by)}" for by, count in left.items()]


def _meet(kind: Kind, own: PreparedData, other: PreparedData) -> bool:
    """Returns whether rows of a kind of the one may stand in a batch with any of the other."""
    return other.own(kind) in other.kinds if own.has_source else any(size == kind[0] for size, _ in other.kinds)


def _named(kinds: Counter, shown: int = 5) -> str:
    """Returns the commonest kinds in words."""

    def words(kind: Kind) -> str:
        size, *sources = (f"{height} x {width}" for height, width in (kind[0], *kind[1]))
        return f"{size} from {' and '.join(sources)}" if sources else size

    more = f" and {len(kinds) - shown} more" if len(kinds) > shown else ""
    return ", ".join(words(kind) for kind, _ in kinds.most_common(shown)) + more
