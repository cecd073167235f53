"""Arguments that several commands share."""

import argparse
from collections.abc import Callable
from pathlib import Path

from danceopd.miniature.shipped import trained_at
from danceopd.support.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")

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
        parser.add_argument("--quiet", action="store_true", help="show no bars")
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


def seed(text: str) -> int:
    """Reads a seed, of the same range as those of a configuration."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to {2**32 - 1}, not {text!r}")
    return int(text)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds the configuration of a training."""
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, for example configs/demo.yaml")


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Adds changes to the keys of a configuration."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"for example {example}")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds the device, and the dtype of the weights on it."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="the weights' dtype (%(default)s)")


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    """Adds the diffusers pipeline that draws, and how."""
    own = "(the pipeline's own)"
    parser.add_argument("--model", type=Path, help="the diffusers pipeline that draws: a folder, or an id of the hub")
    parser.add_argument("--lora", type=Path, help="a LoRA for it, such as a run's student: a file or a folder")
    parser.add_argument("--transformer", type=Path, help="a folder of another transformer for it, as of export --merge")
    parser.add_argument("--num-inference-steps", type=int, help=f"solver steps {own}")
    parser.add_argument("--guidance-scale", type=float, help=own)
    parser.add_argument("--max-sequence-length", type=int, metavar="N", help=f"tokens of a prompt {own}")
    parser.add_argument("--seed", type=seed, default=0, help="the noise follows from it (%(default)s)")


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
    parser.add_argument("--num-inference-steps", type=int, default=16, help="solver steps (%(default)s)")
    parser.add_argument("--shift", type=float, default=5.0, help="shift of the noise levels (%(default)s)")
    parser.add_argument("--solver", choices=("euler", "heun", "ab2"), default="euler")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 is without guidance (%(default)s)")
