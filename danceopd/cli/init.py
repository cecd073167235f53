"""`danceopd init`: a configuration from LoRAs and a few answers."""

import argparse
import sys
from pathlib import Path

from danceopd.cli.arguments import add_command, output_file
from danceopd.cli.train import CARDS
from danceopd.support.errors import UserError

EXAMPLE = """danceopd init my_loras
danceopd init ink.safetensors oil.safetensors --base MODEL --card rtx-4090 -o both.yaml
danceopd init miniature/t2i miniature/edit --base miniature --edit edit --data my_data/manifest.jsonl --card cpu"""


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
    parser.add_argument("loras", nargs="*", metavar="LORA", help="LoRAs, or a folder of LoRAs")
    parser.add_argument("--base", help="the pipeline that they are for: a folder, an id of the hub, or miniature")
    parser.add_argument("--edit", nargs="+", default=[], metavar="NAME", help="the LoRAs that edit pictures")
    parser.add_argument(
        "--data", type=Path, help="a manifest whose task column names the LoRAs (general prompts with their triggers)"
    )
    parser.add_argument("--card", choices=("cpu", *CARDS), help="what trains: %(choices)s (the card that is here)")
    parser.add_argument("--gpus", type=int, default=1, help="number of cards (%(default)s)")
    parser.add_argument(
        "-o", "--output", type=output_file(".yaml", ".yml"), default="danceopd.yaml", help="(%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over a configuration that is there")


def run_init(args: argparse.Namespace) -> int:
    """Writes the files, prints the dry run and the next steps; returns 0 where the configuration is sound."""
    from danceopd.support.files import write_atomic
    from danceopd.support.hub import located
    from danceopd.support.paths import near_path, shipped
    from danceopd.tools.proposal import Wishes, base_of, loras_in, propose

    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} is there already; give another -o, or --overwrite")
    if args.gpus < 1:
        raise UserError("--gpus must be at least 1")
    if args.data and not args.data.is_file():
        raise UserError(f"no manifest at {args.data}{near_path(args.data)}")
    places = args.loras or _answer("LoRAs, or a folder of them", "give them as arguments").split()
    loras = loras_in([shipped(Path(place).expanduser()) for place in places])
    print(f"sources: {', '.join(loras)}")
    base = (
        args.base or base_of(loras) or _answer("the pipeline that they are for", "no file names it; give --base MODEL")
    )
    edits = args.edit
    if not edits and args.data is None and _asks():
        edits = _answer(f"which of {', '.join(loras)} edit pictures", "", default="none").replace(",", " ").split()
        edits = [] if edits == ["none"] else edits
    data = args.data
    if edits and data is None and _asks():
        data = Path(_answer("the manifest with the pictures to edit", "")).expanduser()
    wishes = Wishes(base, loras, edits, data, _card_gib(args.card), args.gpus)
    try:
        model = located(Path(base).expanduser())
    except ValueError as error:
        raise UserError(f"--base: {error}") from None
    proposal = propose(wishes, model, args.output)
    if proposal.rows is not None:
        write_atomic(proposal.manifest, proposal.rows.encode())
        print(f"wrote {proposal.manifest}")
    write_atomic(args.output, proposal.configuration.encode())
    print(f"wrote {args.output}\n")
    sound = _dry_run(args.output)
    print("\nnext:")
    for number, (what, command) in enumerate(proposal.steps, 1):
        print(f"  {number}. {what}\n     {command}")
    return 0 if sound else 2


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
        print(f"\nnot encoded yet: the data of {len(encoded)} capabilities, which step 1 below encodes")
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


def _answer(question: str, otherwise: str, default: str = "") -> str:
    """Asks in a terminal; elsewhere refuses, and says which option answers."""
    if not _asks():
        if default:
            return default
        raise UserError(f"not known: {question}; {otherwise}")
    while not (said := input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default):
        pass
    return said
