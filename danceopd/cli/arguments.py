"""Arguments that several commands share."""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from danceopd.miniature.shipped import trained_at
from danceopd.support.errors import UserError

Answer = TypeVar("Answer", int, float)

DTYPES = ("float32", "bfloat16", "float16")

OWN = "the pipeline's own"  # in a help, of a default

MINIATURE = Path("miniature")  # in the place of a detector or judge: the exact one of that world


def add_command(
    commands, name: str, run, help: str, example: str, shows_bar: bool = False, **options
) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
        commands: Where to.
        name: Its name.
        run: Takes the parsed arguments and returns the exit status, or None.
        help: What it does, as a sentence without its subject.
        example: Lines that a user could type, shown at the end of its help.
        shows_bar: Whether it takes --quiet.
        options: The parser's own.

    Returns:
        The command's parser.
    """
    lines = "\n".join(f"  {line}" for line in example.splitlines())
    options = {"description": f"{help[0].upper()}{help[1:]}."} | options
    parser = commands.add_parser(
        name,
        help=help,
        epilog=f"{'examples' if chr(10) in lines else 'example'}:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    if shows_bar:
        parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    parser.set_defaults(run=run, models=("model", "lora"))  # the arguments that may be an id of the hub
    return parser


def output_folder(text: str) -> Path:
    """Reads the folder that a command writes into; what could not be written is said before anything is computed."""
    from danceopd.support.files import check_writable

    try:
        check_writable(Path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """Returns what reads the file that a command writes: its name ends in one of these, as what is in it is."""

    def read(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text} must end in {' or '.join(suffixes)}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder; give the file to write")
        return output_folder(str(path.parent)) / path.name

    return read


def whole(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """Returns what reads a whole number within bounds, so that others are refused before anything is computed."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        return _within(value, text, least, most)

    return read


def real(above: float | None = None, most: float | None = None) -> Callable[[str], float]:
    """Returns what reads a finite number within bounds."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"must be above {above}, not {text}")
        return _within(value, text, None, most)

    return read


def _within(value: Answer, text: str, least: float | None, most: float | None) -> Answer:
    if least is not None and value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
    return value


seed = whole(0, 2**32 - 1)  # as a configuration's

STEPS, SIDE = 10_000, 16_384  # of a solver, and of a picture: with a digit too many the memory would be full


def refuse_unused(args: argparse.Namespace, uses: Mapping[str, Mapping[str, object]]) -> None:
    """Refuses options that an action would ignore, and gives the others their defaults.

    Args:
        args: With an `action`; an option that was not given is None.
        uses: The options of each action by their names, with their defaults.

    Raises:
        UserError: An option is given that this action does not use.
    """
    own = uses[args.action]
    for name in sorted({name for options in uses.values() for name in options}):
        if name in own:
            setattr(args, name, own[name] if getattr(args, name) is None else getattr(args, name))
        elif getattr(args, name) is not None:
            users = [action for action, options in uses.items() if name in options]
            raise UserError(f"{args.action} uses no --{name}; leave it out, or give {' or '.join(users)}")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds the configuration of a training."""
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="the YAML file, such as configs/demo.yaml"
    )


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Adds changes to the keys of a configuration."""
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help=f"changes a key of the configuration, as {example} does"
    )


def add_device(parser: argparse.ArgumentParser, dtype: str | None = "bfloat16") -> None:
    """Adds the device, and the dtype of the weights on it; without one it is chosen by the device."""
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="where it computes; auto takes a CUDA card if one is there (default: %(default)s)",
    )
    usual = "%(default)s" if dtype else "bfloat16, on a CPU float32"
    parser.add_argument("--dtype", default=dtype, choices=DTYPES, help=f"data type of the weights (default: {usual})")


def add_steps(parser: argparse.ArgumentParser, usual: str, default: int | None = None) -> None:
    """Adds the number of solver steps; usual: what the help says of the default."""
    parser.add_argument(
        "--num-inference-steps",
        type=whole(1, STEPS),
        default=default,
        metavar="N",
        help=f"number of solver steps for a picture (default: {usual})",
    )


def add_resolution(parser: argparse.ArgumentParser, usual: str, default: int | None = None) -> None:
    """Adds the size of square pictures; usual: what the help says of the default."""
    parser.add_argument(
        "--resolution",
        type=whole(1, SIDE),
        default=default,
        metavar="PIXELS",
        help="width and height of a picture, for most models a multiple of 16; of a picture that is not square, "
        f"the root of its area (default: {usual})",
    )


def add_max_sequence_length(parser: argparse.ArgumentParser) -> None:
    """Adds the tokens of a prompt."""
    parser.add_argument(
        "--max-sequence-length",
        type=whole(1),
        metavar="N",
        help="number of tokens that longer prompts are cut to (default: the pipeline's own)",
    )


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    """Adds the diffusers pipeline that draws, and how."""
    parser.add_argument(
        "--model", type=Path, help="the diffusers pipeline that draws: a folder, an id of the hub, or miniature"
    )
    parser.add_argument(
        "--lora", type=Path, help="a LoRA for this pipeline, such as a run's student: a file or a folder"
    )
    parser.add_argument(
        "--transformer",
        type=Path,
        metavar="FOLDER",
        help="another transformer for this pipeline, as danceopd export --merge writes it",
    )
    add_steps(parser, OWN)
    parser.add_argument(
        "--guidance-scale", type=real(), metavar="SCALE", help=f"strength of the guidance (default: {OWN})"
    )
    add_max_sequence_length(parser)
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise (default: %(default)s)")


def fill_sizes(args: argparse.Namespace, model: Path | None, resolution: int | None = 1024) -> None:
    """Sets the resolution and max_sequence_length that a command leaves out: what the miniature was trained at, or what
    suits other models."""
    own = trained_at(model)
    if args.resolution is None:
        args.resolution = own.get("resolution", resolution)
    if args.max_sequence_length is None:
        args.max_sequence_length = own.get("max_sequence_length")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds how pictures are drawn with an embedded network."""
    add_steps(parser, "16", 16)
    parser.add_argument(
        "--shift",
        type=real(above=0),
        default=5.0,
        help="how far the noise levels are moved towards noise; 1 leaves them evenly spaced (default: %(default)g)",
    )
    parser.add_argument(
        "--solver", choices=("euler", "heun", "ab2"), default="euler", help="the solver (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance-scale",
        type=real(),
        default=1.0,
        metavar="SCALE",
        help="strength of the guidance; 1 is without (default: %(default)g)",
    )
