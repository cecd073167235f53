"""`danceopd sample` and `danceopd edit`: pictures by a run, a model or a LoRA, in a grid."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from danceopd.cli.arguments import (
    OWN,
    add_command,
    add_device,
    add_max_sequence_length,
    add_resolution,
    add_steps,
    output_file,
    real,
    seed,
    whole,
)
from danceopd.support.errors import UserError

WHAT = (
    "what draws: a run's folder, a diffusers pipeline (a folder, an id of the hub, or miniature), a LoRA, or an "
    "embedded network (base, t2i, edit or another that danceopd sources lists, or a .safetensors file)"
)

EMBEDDED_ONLY = ("shift", "solver")
MODELS_ONLY = ("lora", "lora_weight", "base", "resolution", "max_sequence_length", "dtype")


def add_sample(commands) -> None:
    """Adds `danceopd sample`."""
    parser = add_command(
        commands,
        "sample",
        run_sample,
        "draw pictures with a run, a model or a LoRA, in a grid",
        shows_bar=True,
        example='danceopd sample base "a photo of a red car and a blue cup" -o cups.png\n'
        'danceopd sample runs/model "a lighthouse" --checkpoint 500 1000 --guidance-scale 1 4\n'
        'danceopd sample ink.safetensors "a lighthouse, in ink" --base MODEL --lora-weight 0 0.5 1',
    )
    parser.add_argument("what", metavar="WHAT", help=WHAT)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="prompts, a row of the grid each")
    _add_grid(parser, "sample.png")


def add_edit(commands) -> None:
    """Adds `danceopd edit`."""
    parser = add_command(
        commands,
        "edit",
        run_sample,
        "edit a picture with a run, a model or a LoRA, in a grid",
        shows_bar=True,
        example='danceopd edit edit room.png "add a red cup" -o edited.png',
    )
    parser.add_argument("what", metavar="WHAT", help=WHAT)
    parser.add_argument("picture", type=Path, help="the picture to edit")
    parser.add_argument("prompts", nargs="+", metavar="INSTRUCTION", help="what to change, a row of the grid each")
    _add_grid(parser, "edit.png")


def _add_grid(parser: argparse.ArgumentParser, output: str) -> None:
    parser.set_defaults(models=("lora", "base"))
    parser.add_argument(
        "-o",
        "--output",
        type=output_file(".png"),
        default=output,
        metavar="FILE",
        help="the PNG to write (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        nargs="+",
        default=[0, 1, 2, 3],
        help="seeds of the noise, a column each (default: 0 1 2 3)",
    )
    parser.add_argument(
        "--guidance-scale",
        type=real(),
        nargs="+",
        metavar="SCALE",
        help=f"strengths of the guidance, a row each (default: {OWN}; of an embedded network 1, which is without)",
    )
    parser.add_argument(
        "--checkpoint",
        type=whole(0),
        nargs="+",
        metavar="STEP",
        help="updates of a run whose checkpoints draw, a row each (default: the newest)",
    )
    parser.add_argument("--lora", type=Path, help="a LoRA for the pipeline: a file, a folder or an id of the hub")
    parser.add_argument(
        "--lora-weight",
        type=real(),
        nargs="+",
        metavar="WEIGHT",
        help="strengths of the LoRA, a row each; 0 draws without it (default: 1)",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="MODEL",
        help="the pipeline of a LoRA that stands as WHAT (default: the one that its file names)",
    )
    add_steps(parser, f"{OWN}; of an embedded network 16")
    add_resolution(parser, OWN)
    add_max_sequence_length(parser)
    parser.add_argument(
        "--shift",
        type=real(above=0),
        help="how far the noise levels of an embedded network are moved towards noise (default: 5)",
    )
    parser.add_argument(
        "--solver", choices=("euler", "heun", "ab2"), help="the solver of an embedded network (default: euler)"
    )
    add_device(parser, None)


def run_sample(args: argparse.Namespace) -> None:
    """Draws, or edits where there is a picture, and writes one PNG."""
    from danceopd.evaluation.grid import draw_grid, pixels
    from danceopd.support.bars import bar
    from danceopd.support.files import write_atomic
    from danceopd.support.pictures import open_picture

    picture = open_picture(args.picture) if getattr(args, "picture", None) else None
    with _networks(args, picture) as networks:
        first = ("to edit", pixels(picture)) if picture else None
        png = draw_grid(
            networks, args.prompts, args.seed, args.guidance_scale or [None], first, lambda rows: bar(rows, unit="row")
        )
    write_atomic(args.output, png)
    print(f"wrote {args.output}")


@contextmanager
def _networks(args: argparse.Namespace, picture) -> Iterator[list]:
    """Finds out what WHAT is, and yields the networks that draw; what is refused is said before one is loaded."""
    from danceopd.config.reading import read_run_config

    run = Path(args.what).expanduser()
    config = read_run_config(run) if (run / "config.yaml").is_file() else None
    if args.checkpoint and config is None:
        raise UserError(f"--checkpoint is of a run, and {args.what} is none: a run's folder has a config.yaml")
    if (config is not None and not config.model) or (config is None and _is_embedded(args.what)):
        _refuse(args, MODELS_ONLY, f"{args.what} is an embedded network")
        yield list(_embedded(args, run if config else None))
    else:
        _refuse(args, EMBEDDED_ONLY, f"{args.what} is drawn with as its pipeline does")
        with tempfile.TemporaryDirectory() as work:
            yield list(_pipelines(args, run, config, picture, Path(work)))


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given:
        raise UserError(f"{why}; leave out {', '.join(given)}")


def _is_embedded(what: str) -> bool:
    from danceopd.world.files import read_config, shipped_sources

    path = Path(what).expanduser()
    if what in shipped_sources() or path.suffix != ".safetensors" or not path.is_file():
        return what in shipped_sources()
    try:
        read_config(path)
    except UserError:
        return False  # a LoRA, or damaged, which is said where it is read
    return True


def _embedded(args: argparse.Namespace, run: Path | None) -> Iterator:
    """Yields the embedded network, or a run's student, at each checkpoint."""
    from danceopd.evaluation.grid import Network
    from danceopd.support.devices import find_own_device
    from danceopd.tools.students import checkpoint_of
    from danceopd.training.assembly.parts import averaged_student
    from danceopd.world.files import load_model, resolve_weights
    from danceopd.world.own_data import load_picture
    from danceopd.world.scoring import as_field, load_field

    weights = str(run / "student.safetensors") if run else args.what
    if run and not Path(weights).is_file():
        raise UserError(f"{run} holds no student yet: its first checkpoint writes it; train on with danceopd train")
    shift = 5.0 if args.shift is None else args.shift
    _, sampler = load_field(weights, args.num_inference_steps or 16, shift, args.solver or "euler", 1.0)
    sampler = replace(sampler, device=find_own_device(args.device))
    picture = getattr(args, "picture", None)
    source = load_picture(picture, sampler.image_size)[None] if picture else None

    def loaded(checkpoint):
        def load():
            network = load_model(resolve_weights(weights))
            if checkpoint:
                network = averaged_student(network, checkpoint)
            network.to(sampler.device)

            def draw(prompt, seed, scale):
                return sampler(as_field(network, 1.0 if scale is None else scale), [prompt], source, seed)[0]

            return draw

        return load

    steps = {step: checkpoint_of(run, step) for step in args.checkpoint or ()}
    if not steps:
        yield Network("", loaded(None))
    for step, checkpoint in steps.items():
        yield Network(f"step {step}", loaded(checkpoint))


def _pipelines(args: argparse.Namespace, run: Path, config, picture, work: Path) -> Iterator:
    """Yields the pipeline with each checkpoint and each weight of the LoRA."""
    import torch

    from danceopd.evaluation.grid import Network, found
    from danceopd.miniature.shipped import trained_at
    from danceopd.support.devices import find_own_device
    from danceopd.tools.students import student_files
    from danceopd.world.files import shipped_sources

    device = find_own_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    if config is None:
        files = {"": found(args.what, args.lora, args.base, shipped_sources())}
    else:
        if args.lora or args.base:
            raise UserError(f"{run} is a run, with a base and a student of its own; leave out --lora and --base")
        files = {
            f"step {step}" if step is not None else "": {
                "model": config.model,
                **student_files(run, config, step, work),
            }
            for step in args.checkpoint or [None]
        }
    if args.lora_weight and not all(one.get("lora") for one in files.values()):
        raise UserError("--lora-weight needs a LoRA: give --lora, or a LoRA or a run that trained one as WHAT")
    from danceopd.evaluation.grid_pipeline import Pipeline  # imports diffusers: what is mistyped is said without it

    weights = args.lora_weight or [1.0]
    for label, paths in files.items():
        own = trained_at(paths["model"])
        for weight in weights:
            pipeline = Pipeline(
                **paths,
                weight=weight,
                picture=picture,
                resolution=args.resolution or own.get("resolution"),
                num_inference_steps=args.num_inference_steps,
                max_sequence_length=args.max_sequence_length or own.get("max_sequence_length"),
                device=device,
                dtype=dtype,
            )
            pipeline.check()
            weighed = f"LoRA x {weight:g}" if len(weights) > 1 else ""
            yield Network(", ".join(filter(None, [label, weighed])), pipeline.load)
