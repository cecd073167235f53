"""`danceopd completion`: a script by which a shell completes commands, options and files."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import add_command

EXAMPLE = """danceopd completion bash > ~/.local/share/bash-completion/completions/danceopd
danceopd completion zsh > ~/.zsh/_danceopd   # a folder of $fpath"""


def add_completion(commands) -> None:
    """Adds `danceopd completion`."""
    parser = add_command(
        commands,
        "completion",
        run_completion,
        "print a script that completes commands, options and files in a shell",
        example=EXAMPLE,
    )
    # The whole parser comes with the arguments: a default that it sets itself.
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that the script is for")


def run_completion(args: argparse.Namespace) -> None:
    """Prints the script."""
    import shtab

    _complete_files(args.parser, shtab.FILE)
    print(shtab.complete(args.parser, shell=args.shell))


def _complete_files(parser: argparse.ArgumentParser, file: dict) -> None:
    """Marks every argument that is a path; of `evaluate geneval` and its like the shell sees `evaluate` alone."""
    for action in parser._actions:
        if action.type is Path:
            action.complete = file
        if isinstance(action, argparse._SubParsersAction):
            action.help = None  # the help lists commands in groups and hides this list, which would be left out here
            for name in [name for name in action.choices if " " in name]:
                del action.choices[name]
            action._choices_actions = [one for one in action._choices_actions if " " not in one.dest]
            for child in action.choices.values():
                _complete_files(child, file)
