"""The parser of the command line, and its main function."""

import argparse
import io
import os
import sys
from pathlib import Path

from danceopd.cli.check_model import add_check_model
from danceopd.cli.compare import add_compare
from danceopd.cli.completion import add_completion
from danceopd.cli.data import add_data
from danceopd.cli.doctor import add_doctor
from danceopd.cli.gedit import add_gedit
from danceopd.cli.geneval import add_geneval
from danceopd.cli.init import add_init
from danceopd.cli.miniature import add_miniature
from danceopd.cli.reward import add_reward
from danceopd.cli.runs import add_export, add_merge_loras, add_report, add_reproduce
from danceopd.cli.sample import add_edit, add_sample
from danceopd.cli.train import add_demo, add_plan, add_train
from danceopd.cli.watch import add_watch
from danceopd.cli.world import add_evaluate, add_sources
from danceopd.support.errors import UserError
from danceopd.support.exits import guarded, quieten
from danceopd.support.hints import did_you_mean
from danceopd.support.hub import downloads, located

DESCRIPTION = "Distil several flow-matching models into one student on its own trajectories (DanceOPD)."

EXAMPLES = """examples:
  danceopd doctor                                                is everything here that a run needs?
  danceopd init my_loras                                         a configuration from a folder of LoRAs
  danceopd train --config configs/demo.yaml                      train, or go on where a run stopped
  danceopd watch runs/demo                                       its loss, scores and samples on a page
  danceopd sample runs/demo "a photo of a red car and a blue cup" -o cups.png

danceopd COMMAND --help has the options of a command, and an example."""

# The commands as the help lists them.
GROUPS = (
    ("Start", (add_doctor, add_demo, add_init, add_sample, add_edit)),
    ("Train", (add_train, add_plan, add_watch, add_merge_loras, add_export)),
    ("Data", (add_data, add_sources, add_miniature)),
    ("Evaluate", (add_report, add_evaluate, add_geneval, add_gedit, add_reward, add_compare)),
    ("Tools", (add_check_model, add_reproduce, add_completion)),
)


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest command, option or value where there is none of a name."""

    def parse_known_args(self, args=None, namespace=None):
        """Takes a list of arguments that are no options from wherever they stand, not from one place alone."""
        if self._subparsers and args and args[0].startswith("--"):
            self._check_option(args[0])
        namespace, rest = super().parse_known_args(args, namespace)
        places = [action for action in self._get_positional_actions() if action.nargs in ("*", "+")]
        if places and rest and "--" not in rest:
            more = [text for text in rest if not text.startswith("-")]
            values = [*getattr(namespace, places[-1].dest), *(self._get_value(places[-1], text) for text in more)]
            setattr(namespace, places[-1].dest, values)
            rest = [text for text in rest if text.startswith("-")]
        options = [text for text in rest if text.startswith("--") and text != "--"]
        if options and not self._subparsers:
            self._check_option(options[0])
        return namespace, rest

    def _check_option(self, text: str) -> None:
        """Ends with the nearest option where there is none of this name; what begins one's name stands for it."""
        name = text.partition("=")[0]
        if not any(option.startswith(name) for option in self._option_string_actions):
            near = did_you_mean(name, self._option_string_actions, f"; {self.prog} --help lists them")
            self.error(f"there is no option {name}{near}")

    def error(self, message: str):
        """Ends with a message; where a command lacks its first word, with the words that there are."""
        if self._subparsers and message.startswith("the following arguments are required"):
            choices = next(a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction))
            message += f": one of {', '.join(choices)}" if len(choices) < 10 else f"; {self.prog} --help lists them"
        super().error(message)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            hint = did_you_mean(value, action.choices, f"; {self.prog} --help lists them")
            raise argparse.ArgumentError(None, f"there is no command {value!r}{hint}")
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value!r} is not valid{did_you_mean(value, action.choices)}")


class Version(argparse.Action):
    """Prints the version and, in a repository, the commit."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from danceopd.support.versions import version

        print(f"danceopd {version()}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands; each command's own file adds its arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("danceopd", usage="danceopd [--version] COMMAND ...", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and its commit")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed --module
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog="danceopd", help=argparse.SUPPRESS
    )
    lines = []
    for title, adders in GROUPS:
        before = len(commands._choices_actions)
        for add in adders:
            add(commands)
        lines += [f"{title}:", *(f"  {one.dest:17} {one.help}" for one in commands._choices_actions[before:]), ""]
    parser.epilog = "\n".join([*lines, EXAMPLES])
    parser.set_defaults(parser=parser)  # which `completion` describes to a shell
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the arguments name (this process's own if not given); returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["evaluate"] and argv[1:2] and argv[1] in ("geneval", "gedit", "reward"):
        argv[:2] = [" ".join(argv[:2])]  # commands of their own beside `evaluate CHECKPOINT`
    if not argv:
        build_parser().print_help()
        return 0
    if argv[0] == "evaluate" and len(argv) > 2 and not argv[2].startswith("-") and not Path(argv[1]).exists():
        near = did_you_mean(argv[1], ("geneval", "gedit", "reward"), "; give one network, or geneval, gedit or reward")
        build_parser().error(f"there is no evaluation {argv[1]!r}{near}")
    args = build_parser().parse_args(argv)
    for name, value in vars(args).items():  # a shell leaves the ~ of --cache=~/x to the command
        if isinstance(value, Path):
            setattr(args, name, Path(os.path.expanduser(value)))
        elif isinstance(value, list) and all(isinstance(one, Path) for one in value):
            setattr(args, name, [Path(os.path.expanduser(one)) for one in value])
    quieten()
    if getattr(args, "quiet", False):
        os.environ["TQDM_DISABLE"] = "1"  # tqdm's own, which processes that this one starts inherit
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
