"""`danceopd init`: a configuration from LoRAs and a few answers."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from danceopd.cli.arguments import add_command, output_file, whole
from danceopd.cli.train import CARDS
from danceopd.miniature.shipped import trained_at
from danceopd.support.errors import UserError
from danceopd.support.texts import many

if TYPE_CHECKING:
    from danceopd.tools.proposal import Wishes

EXAMPLE = """danceopd init my_loras
danceopd init ink.safetensors oil.safetensors --base MODEL --card rtx-4090 -o both.yaml
danceopd init miniature/t2i miniature/edit --base miniature --edit edit --data my_data/manifest.jsonl --card cpu"""


NONE, HERE = "none", "here"  # answers; the second is the card that is here

Answer = TypeVar("Answer")


def add_init(commands) -> None:
    """Adds `danceopd init`."""
    parser = add_command(
        commands,
        "init",
        run_init,
        "write a commented configuration for LoRAs of a model, and say what to type next",
        example=EXAMPLE,
        description="Write a commented configuration for LoRAs of a model, dry-run it, and say what to type next.\n"
        "In a terminal, what no option gives is asked.",
    )
    parser.set_defaults(models=(), dry_run=True, download=False)
    parser.add_argument(
        "loras", nargs="*", metavar="LORA", help="a LoRA's file or folder, or a folder of several LoRAs"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the pipeline that the LoRAs are for: a folder, an id of the hub, or miniature (default: the one that "
        "their files name)",
    )
    parser.add_argument("--edit", nargs="+", default=[], metavar="NAME", help="names of the LoRAs that edit pictures")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="a manifest whose task column names the LoRAs (default: general prompts with the words that call them)",
    )
    parser.add_argument(
        "--card",
        choices=("cpu", *CARDS),
        metavar="CARD",
        help="what trains: %(choices)s (default: the card that is here, or else cpu)",
    )
    parser.add_argument("--gpus", type=whole(1), metavar="N", help="number of cards (default: 1)")
    parser.add_argument(
        "-o",
        "--output",
        type=output_file(".yaml", ".yml"),
        default="danceopd.yaml",
        metavar="FILE",
        help="the configuration to write (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write over a configuration that is there")


def run_init(args: argparse.Namespace) -> int:
    """Writes the files, prints the dry run and the next steps; returns 0 where the configuration is sound."""
    from danceopd.support.files import write_atomic
    from danceopd.support.paths import near_path
    from danceopd.tools.proposal import propose

    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} is there already; give another -o, or --overwrite")
    if args.data and not args.data.is_file():
        raise UserError(f"no manifest at {args.data}{near_path(args.data)}")
    wishes = _wishes(args)
    base = _located(wishes.base)
    proposal = propose(wishes, base, args.output, trained_at(base).get("max_sequence_length"))
    if proposal.rows is not None:
        write_atomic(proposal.manifest, proposal.rows.encode())
        print(f"wrote {proposal.manifest}")
    write_atomic(args.output, proposal.configuration.encode())
    print(f"wrote {args.output}\n")
    for warning in proposal.warnings:
        print(f"warning: {warning}")
    sound = _dry_run(args.output)
    print("\nnext:")
    for number, (what, command) in enumerate(proposal.steps, 1):
        print(f"  {number}. {what}\n     {command}")
    return 0 if sound else 2


def _wishes(args: argparse.Namespace) -> "Wishes":
    """Takes what the options give, and asks for the rest where that is possible."""
    from danceopd.tools.proposal import Wishes, base_of

    asks, edits, data, card, gpus = _asks(), args.edit, args.data, args.card, args.gpus
    if args.loras:
        loras = _loras(args.loras)
    else:
        loras = _answer("LoRAs, or a folder of them", lambda text: _loras(shlex.split(text)), "give them as arguments")
    print(f"sources: {', '.join(loras)}")
    base = args.base or base_of(loras)
    if not base:
        base = _answer("the pipeline that they are for", _base, "no file names it; give --base MODEL")
    if asks and not edits and data is None:
        which = f"which of {', '.join(loras)} edit pictures"
        edits = _answer(which, lambda text: _named(text, loras), default=NONE)
    if asks and data is None:
        own = "the manifest with the pictures to edit" if edits else "a manifest of your own prompts"
        data = _answer(own, lambda text: _manifest(text, loras, edits), default=None if edits else NONE)
    if asks and card is None:
        card = _answer("what trains, a card or cpu", lambda text: _one_of((HERE, "cpu", *CARDS), text), default=HERE)
    if asks and gpus is None and card != "cpu":
        gpus = _answer("how many of them", _number, default="1")
    return Wishes(base, loras, edits, data, _card_gib(None if card == HERE else card), gpus or 1)


def _loras(places: Sequence[str]) -> dict[str, Path]:
    from danceopd.support.paths import shipped
    from danceopd.tools.proposal import loras_in

    return loras_in([shipped(Path(place).expanduser()) for place in places])


def _located(base: str) -> Path:
    from danceopd.support.hub import located

    try:
        return located(Path(base).expanduser())
    except ValueError as error:
        raise UserError(f"--base: {error}") from None


def _base(text: str) -> str:
    from danceopd.tools.proposal import check_base

    check_base(_located(text))
    return text


def _named(text: str, loras: Mapping[str, Path]) -> list[str]:
    return [] if text == NONE else [_one_of(loras, name) for name in text.replace(",", " ").split()]


def _manifest(text: str, loras: Iterable[str], edits: Sequence[str]) -> Path | None:
    from danceopd.support.paths import near_path
    from danceopd.tools.proposal import data_for

    path = Path(text).expanduser()
    if text == NONE and not edits:
        return None
    if not path.is_file():
        raise UserError(f"there is no manifest at {path}{near_path(path)}")
    data_for(loras, edits, path)
    return path


def _one_of(words: Iterable[str], text: str) -> str:
    from danceopd.support.hints import did_you_mean

    if text not in words:
        raise UserError(f"{text!r} is not known{did_you_mean(text, words)}")
    return text


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{text!r} is no number of cards; give 1 or more")
    return int(text)


def _dry_run(file: Path) -> bool:
    """Prints what the run takes, and tells whether it can start once its data is encoded."""
    from danceopd.api import examiner_of
    from danceopd.config.reading import load_config
    from danceopd.planning.dry_run import dry_run

    config = load_config(file)
    findings = dry_run(config, examiner_of(config))
    encoded = [problem for problem in findings.problems if ".prepared" in problem or ".data" in problem]
    findings.problems[:] = [problem for problem in findings.problems if problem not in encoded]
    print(findings.text())
    if encoded:
        whose = many(len(encoded), "capability", "capabilities")
        print(f"\nnot encoded yet: the data of {whose}, which step 1 below encodes")
    return not findings.problems


def _card_gib(card: str | None) -> float | None:
    """Returns the memory of a card by its name, or of the one that is here; None for the processor."""
    import torch

    from danceopd.support.cards import CARDS
    from danceopd.support.memory import GIB

    if card is None and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return None if card in (None, "cpu") else CARDS[card].memory / GIB


def _asks() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _answer(question: str, read: Callable[[str], Answer], otherwise: str = "", default: str | None = None) -> Answer:
    """Asks in a terminal until the answer can be read; elsewhere refuses, and says which option answers."""
    if not _asks():
        raise UserError(f"not known: {question}; {otherwise}")
    while True:
        said = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        try:
            if said:
                return read(said)
        except UserError as error:
            print(f"  {error}")
