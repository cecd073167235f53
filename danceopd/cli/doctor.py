"""`danceopd doctor`: whether everything is here that a run needs."""

import argparse
import json

from danceopd.cli.arguments import add_command


def add_doctor(commands) -> None:
    """Adds `danceopd doctor`."""
    parser = add_command(
        commands,
        "doctor",
        run_doctor,
        "look at what is installed and at the machine, and say what is missing and how to mend it",
        example="danceopd doctor\ndanceopd doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run_doctor(args: argparse.Namespace) -> int:
    """Prints what is found; returns 1 where the embedded network would not run."""
    from danceopd.planning.doctor import examine_machine, text_of, values_of

    found = examine_machine(_try_embedded)
    values = values_of(found)
    print(json.dumps(values, indent=1) if args.json else text_of(found))
    return 0 if values["ok"] else 1


def _try_embedded() -> str:
    """Draws a picture with a network that ships, as the demo's evaluation does."""
    from danceopd.world.scoring import load_field

    field, sampler = load_field("base", 1, 5.0, "euler", 1.0)
    picture = sampler(field, ["a photo of a red cup"], None, 0)
    if not picture.isfinite().all():
        raise ArithmeticError("it draws numbers that are not finite")
    return f"draws a picture of {picture.shape[3]} x {picture.shape[2]} pixels"
