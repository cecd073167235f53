"""What is asked of whom: prompts of a file with the LoRAs' triggers put in, in routes."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from danceopd.support.errors import UserError
from danceopd.support.hints import did_you_mean
from danceopd.support.texts import lines_of, many, parse_json, read_text
from danceopd.tools.merge_loras.triggers import Trigger

SHIPPED = Path(__file__).with_name("prompts.txt")

PLAIN = "no trigger"  # the route of prompts as they are

BASE, PAIRS = 0.2, 0.2  # shares of the samples: prompts as they are, and all pairs together

EMPTY = 0.25  # of the prompts as they are, this share is left empty, so that guidance works on the result


@dataclass(frozen=True)
class Prompts:
    """The lines of a file of prompts.

    Attributes:
        shared: For every LoRA, as they are.
        own: For one of them with its trigger in them, by its name.
        twice: Number of lines that stood there before.
        general: The shipped ones, for the base and the pairs, where none is for all LoRAs.
    """

    shared: list[str]
    own: dict[str, list[str]] = field(default_factory=dict)
    twice: int = 0
    general: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Route:
    """Samples that are asked of one source.

    Attributes:
        name: Of the capability.
        loras: The LoRAs that answer, together; none for the base.
        rows: (prompt of the result, what the source hears).
        weight: Its share of the samples.
        empty: The share of its prompts that are left empty.
    """

    name: str
    loras: tuple[str, ...]
    rows: list[tuple[str, str]]
    weight: float
    empty: float = 0.0


def read_prompts(path: Path, names: Sequence[str]) -> Prompts:
    """Reads a prompt a line, for all LoRAs, or for one of them as NAME<TAB>PROMPT.

    Args:
        path: The file.
        names: The LoRAs'.

    Returns:
        The prompts, each once.

    Raises:
        UserError: It cannot be read, holds no prompt, or has lines that are of no use, which are listed.
    """
    shared: dict[str, None] = {}
    own: dict[str, dict[str, None]] = {}
    problems, twice = [], 0
    asked: dict[str, tuple[int, str]] = {}  # where a prompt stands first, and whose it is there
    for number, line in lines_of(read_text(path, "file of prompts")):
        name, tab, prompt = line.partition("\t")
        name, prompt = (name.strip(), prompt.strip()) if tab else ("", line.strip())
        if tab and name not in names:
            problems.append(f"line {number}: no LoRA {name!r}{did_you_mean(name, names)}")
            continue
        if _is_json(prompt):
            problems.append(f"line {number}: is JSON; write the prompt itself, one a line")
            continue
        if not prompt:
            problems.append(f"line {number}: no prompt after {name!r}")
            continue
        first, other = asked.setdefault(prompt, (number, name))
        if other != name:
            whose = f"of {other or 'all LoRAs'} in line {first} and of {name or 'all LoRAs'} here"
            problems.append(f"line {number}: {prompt!r} is {whose}, and one prompt has one source; leave one out")
            continue
        place = own.setdefault(name, {}) if tab else shared
        twice += prompt in place
        place[prompt] = None
    if not problems and not shared and not own:
        problems.append("no prompt in it")
    if not problems and not shared:
        problems += [f"no prompt for {name}" for name in names if name not in own]
    if problems:
        raise UserError("\n    ".join([f"{path} cannot be used:", *problems]))
    general = [] if shared else [line.strip() for _, line in lines_of(read_text(SHIPPED, "file of prompts"))]
    return Prompts(list(shared), {name: list(lines) for name, lines in own.items()}, twice, general)


def without_triggers(prompts: Prompts, triggers: Mapping[str, Trigger]) -> tuple[Prompts, str]:
    """Leaves out prompts for all LoRAs in which a trigger's words stand: the base would be asked what calls a LoRA.

    Args:
        prompts: The prompts.
        triggers: Of the LoRAs by name.

    Returns:
        The prompts, and a line about what is left out; "" where nothing is.

    Raises:
        UserError: No prompt is left.
    """
    texts = prompts.shared or prompts.general
    kept = [text for text in texts if not any(trigger.stands_in(text) for trigger in triggers.values())]
    if len(kept) == len(texts):
        return prompts, ""
    if not kept:
        raise UserError("every prompt has a trigger's words in it; write prompts without, or NAME<TAB>prompt")
    out = len(texts) - len(kept)
    what = many(out, "prompt has a trigger's words in it and is", "prompts have triggers' words in them and are")
    left = replace(prompts, shared=kept) if prompts.shared else replace(prompts, general=kept)
    return left, f"{what} left out, for without a trigger the base is asked"


def notes_on(prompts: Prompts, triggers: Mapping[str, Trigger]) -> list[str]:
    """Says what of prompts and triggers is likely not meant.

    Args:
        prompts: The prompts.
        triggers: Of the LoRAs by name.

    Returns:
        The lines.
    """
    notes = []
    if prompts.general:
        notes.append(
            "no prompt is for all LoRAs: the base, and pairs of LoRAs, are asked the general prompts that ship; lines "
            "without NAME<TAB> take their place"
        )
    for name, trigger in triggers.items():
        own = prompts.own.get(name, [])
        lack = [text for text in own if not trigger.stands_in(text)] if trigger.words else []
        if lack:
            notes.append(
                f"the words {trigger.words!r} that call {name} are missing in {len(lack)} of its "
                f"{many(len(own), 'prompt')}, such as {lack[0]!r}: there the result learns to draw as {name} "
                "without being called"
            )
        for other, longer in triggers.items():
            if other != name and trigger.stands_in(longer.phrase()):
                notes.append(
                    f"the words {trigger.words!r} that call {name} stand in those of {other}, {longer.words!r}, and "
                    f"are hard to tell apart; --trigger {name}=WORDS gives other ones"
                )
    return notes


def _is_json(line: str) -> bool:
    """Tells whether a line is an object or a list of JSON, as manifests have them, and no prompt."""
    if line[:1] not in ("{", "["):
        return False
    try:
        return isinstance(parse_json(line), dict | list)
    except ValueError:
        return False


def routes_of(triggers: dict[str, Trigger], prompts: Prompts, pairs: bool) -> list[Route]:
    """Says what is asked of whom.

    Prompts for all LoRAs, or the general ones where there are none, go as they are to the base, with each trigger to
    its LoRA, and with two triggers to both together; LoRAs without words act on all of them. The pairs share the
    prompts among them. With as many prompts as they are as of pairs, the mean of what the LoRAs change is the one
    change of weights with the least expected squared distance from what the samples' sources change, and so it is what
    the student begins as.

    Args:
        triggers: Of the LoRAs by name.
        prompts: The prompts.
        pairs: Whether pairs are asked.

    Returns:
        The routes that have prompts.
    """
    called = [name for name, trigger in triggers.items() if trigger.words]
    always = tuple(name for name in triggers if name not in called)
    general = prompts.shared or prompts.general
    two = list(combinations(called, 2)) if pairs and general else []
    each = (1 - BASE - (PAIRS if two else 0)) / max(1, len(called))

    def rows(names: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
        spoken, heard = list(texts), list(texts)
        for trigger in (triggers[name] for name in reversed(names)):
            spoken = [trigger.call(text) for text in spoken]
            heard = [trigger.call(text) if trigger.known else text for text in heard]
        return list(dict(zip(spoken, heard, strict=True)).items())

    plain = [(text, text) for text in (*general, *(own for name in always for own in prompts.own.get(name, [])))]
    routes = [Route(PLAIN, always, plain, BASE if called else 1.0, EMPTY)]
    for name in called:
        own = [(text, text) for text in prompts.own.get(name, [])]
        asked = list(dict([*rows([name], prompts.shared), *own]).items())
        routes.append(Route(name, (name, *always), asked, each))
    for i, names in enumerate(two):
        least = max(8, len(general) // len(two))  # a pair gets its share, from a place of its own
        some = [general[(i * least + j) % len(general)] for j in range(min(least, len(general)))]
        routes.append(Route(" + ".join(names), (*names, *always), rows(names, some), PAIRS / len(two)))
    return [route for route in routes if route.rows]


def say(line: str) -> None:
    """Prints a line of what is going on."""
    print(line, file=sys.stderr, flush=True)
