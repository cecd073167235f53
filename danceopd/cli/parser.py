"""The parser of the command line, and its main function."""

import argparse
import io
import os
import sys
from pathlib import Path

from danceopd.cli.check_model import add_check_model
from danceopd.cli.compare import add_compare
from danceopd.cli.data import add_data
from danceopd.cli.gedit import add_gedit
from danceopd.cli.geneval import add_geneval
from danceopd.cli.miniature import add_miniature
from danceopd.cli.reward import add_reward
from danceopd.cli.runs import add_export, add_merge_loras, add_report, add_reproduce
from danceopd.cli.train import add_plan, add_train
from danceopd.cli.world import add_evaluate, add_sample, add_sources
from danceopd.support.errors import UserError
from danceopd.support.exits import guarded, quieten
from danceopd.support.hints import did_you_mean
from danceopd.support.hub import downloads, located

DESCRIPTION = "Distil several flow-matching models into one student on its own trajectories (DanceOPD)."

EPILOG = """examples:
  danceopd train --config configs/demo.yaml                     train, or go on where a run stopped
  danceopd train --config configs/demo.yaml training.max_steps=50 training.output_dir=runs/short
  danceopd train --config configs/demo.yaml --dry-run            what a run takes, and what it lacks
  danceopd plan --config configs/demo.yaml --gpus 8 --gpu h100   an estimate: does it fit, how long does it take
  danceopd report runs/demo                                      score every row, write report.html
  danceopd export runs/model -o my_lora                          the student, for the plain diffusers pipeline
  danceopd merge-loras ink.safetensors oil.safetensors --base MODEL -o merged.safetensors   several LoRAs in one
  danceopd reproduce A                                           six methods at equal cost, in half an hour
  danceopd evaluate runs/demo/student.safetensors --json row.json
  danceopd evaluate gedit GEDIT --model MODEL --lora my_lora -o results --judge-url URL --judge-model NAME
  danceopd sample base "a photo of a red car and a blue cup" -o cups.png
  danceopd sources                                               the networks that ship with the package
  danceopd data check my_data/manifest.jsonl                     every problem of a manifest, by line
  danceopd check-model MODEL                                     does it draw here as in diffusers, stage by stage
"""


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest command where there is none of a name."""

    def parse_known_args(self, args=None, namespace=None):
        """Takes a list of arguments that are no options from wherever they stand, not from one place alone."""
        namespace, rest = super().parse_known_args(args, namespace)
        places = [action for action in self._get_positional_actions() if action.nargs in ("*", "+")]
        if places and rest and "--" not in rest:
            more = [text for text in rest if not text.startswith("-")]
            values = [*getattr(namespace, places[-1].dest), *(self._get_value(places[-1], text) for text in more)]
            setattr(namespace, places[-1].dest, values)
            rest = [text for text in rest if text.startswith("-")]
        return namespace, rest

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            hint = did_you_mean(value, action.choices, "; danceopd --help lists them")
            raise argparse.ArgumentError(None, f"there is no command {value!r}{hint}")
        super()._check_value(action, value)


class Version(argparse.Action):
    """Prints the version and, in a repository, the commit."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from danceopd.support.versions import version

        print(f"danceopd {version()}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands; each command's own file adds its arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("danceopd", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and its commit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands)
    add_plan(commands)
    add_evaluate(commands)
    add_geneval(commands)
    add_compare(commands)
    add_gedit(commands)
    add_reward(commands)
    add_sample(commands)
    add_report(commands)
    add_export(commands)
    add_merge_loras(commands)
    add_reproduce(commands)
    add_sources(commands)
    add_data(commands)
    add_miniature(commands)
    add_check_model(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the arguments name (this process's own if not given); returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["evaluate"] and argv[1:2] and argv[1] in ("geneval", "gedit", "reward"):
        argv[:2] = [" ".join(argv[:2])]  # commands of their own beside `evaluate CHECKPOINT`
    if not argv:
        build_parser().print_help()
        return 0
    args = build_parser().parse_args(argv)
    for name, value in vars(args).items():  # a shell leaves the ~ of --cache=~/x to the command
        if isinstance(value, Path):
            setattr(args, name, Path(os.path.expanduser(value)))
        elif isinstance(value, list) and all(isinstance(one, Path) for one in value):
            setattr(args, name, [Path(os.path.expanduser(one)) for one in value])
    quieten()
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show, such as a file's name, ends no command
        sys.stdout.reconfigure(errors="backslashreplace")
    return guarded(_run, args)


def _run(args: argparse.Namespace):
    """Runs a command, once its model and its LoRA are there; what may not download finds them in the hub's cache."""
    with downloads(getattr(args, "download", True) or not getattr(args, "dry_run", False)):
        for name in args.models:
            try:
                if isinstance(value := getattr(args, name, None), Path):
                    setattr(args, name, located(value))
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
        return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
