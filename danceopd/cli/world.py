"""Commands on the embedded networks: `danceopd evaluate` and `sources`."""

import argparse
import json
from pathlib import Path

from danceopd.cli.arguments import add_command, add_sampling, output_file, output_folder, refuse_unused, seed, whole
from danceopd.support.errors import UserError

CHECKPOINT = "a run's folder, a .safetensors file, or the name of an embedded network"


def add_evaluate(commands) -> None:
    """Adds `danceopd evaluate`."""
    parser = add_command(
        commands,
        "evaluate",
        run_evaluate,
        "score a checkpoint of the embedded network on the picture world",
        shows_bar=True,
        example="danceopd evaluate runs/demo/student.safetensors --json row.json",
    )
    parser.add_argument("checkpoint", help=CHECKPOINT)
    parser.add_argument(
        "--json", type=output_file(".json"), metavar="FILE", help="a file to write the row of scores into"
    )
    parser.add_argument(
        "--seed", type=seed, default=1234, help="seed of prompts, placements and noise (default: %(default)s)"
    )
    parser.add_argument("--name", help="the name of the row (default: that of the file or folder)")
    parser.add_argument(
        "--per-task",
        type=whole(1),
        default=100,
        metavar="N",
        help="pictures of each GenEval task (default: %(default)s)",
    )
    parser.add_argument(
        "--per-kind",
        type=whole(1),
        default=100,
        metavar="N",
        help="pictures of each kind of edit (default: %(default)s)",
    )
    parser.add_argument(
        "--pictures",
        type=output_folder,
        metavar="FOLDER",
        help="a new folder that GenEval's pictures are kept in, for danceopd compare",
    )
    add_sampling(parser)


def add_sources(commands) -> None:
    """Adds `danceopd sources`."""
    parser = add_command(
        commands, "sources", run_sources, "list the embedded networks, or train them again", example="danceopd sources"
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "train", "card"),
        default="list",
        metavar="ACTION",
        help="list says where they lie, train makes them again, card scores them and writes their description "
        "(default: list)",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="with train, these networks alone (default: all)")
    parser.add_argument(
        "--folder",
        type=output_folder,
        help="with train where they are trained, with card where their logs are (default: runs/sources)",
    )


def run_evaluate(args: argparse.Namespace) -> None:
    """Scores a checkpoint and prints its row."""
    from danceopd.report.tables import format_table
    from danceopd.support.files import write_atomic
    from danceopd.world.scoring import load_field, score_row

    how = (args.num_inference_steps, args.shift, args.solver, args.guidance_scale)
    weights = _weights(args.checkpoint)
    field, sampler = load_field(weights, *how)
    given = Path(args.checkpoint)
    name = args.name or (given.name if given.is_dir() else given.stem)
    row = score_row(name, field, sampler, args.seed, args.per_task, args.per_kind, pictures=args.pictures)
    print(format_table({"rows": [row]}))
    if args.json:
        write_atomic(args.json, (json.dumps(row, indent=1) + "\n").encode())
        print(f"wrote {args.json}")


def _weights(checkpoint: str) -> str:
    """Finds the network that a user means: a run's folder stands for its student.

    Raises:
        UserError: It is a run without a student yet, or what other commands score, which are named.
    """
    from danceopd.config.reading import read_run_config
    from danceopd.support.paths import shipped
    from danceopd.world.files import is_lora, shipped_sources

    path = shipped(Path(checkpoint).expanduser())
    if checkpoint in shipped_sources():
        return checkpoint
    run = path.parent if path.name == "student" else path
    if path.is_dir() and (run / "config.yaml").is_file():
        config, student = read_run_config(run), run / "student.safetensors"
        if config.model:
            part = "lora" if config.student.lora else "transformer"
            raise UserError(
                f"{run} is a model's run, and this scores the embedded network; type danceopd report {run}, or "
                f"danceopd evaluate geneval OUT --metadata FILE --model {config.model} --{part} {run / 'student'}"
            )
        if not student.is_file():
            raise UserError(f"{run} holds no student yet: its first checkpoint writes it; train on with danceopd train")
        return str(student)
    if path.is_dir() or is_lora(path):
        raise UserError(
            f"{checkpoint} is no run's folder and no embedded network; a pipeline, or a LoRA on it, is scored by "
            "danceopd evaluate geneval OUT --metadata FILE --model MODEL --lora LORA"
        )
    return str(path)


def run_sources(args: argparse.Namespace) -> None:
    """Lists the embedded networks, trains them again, or writes their model card."""
    from danceopd.support.hints import did_you_mean
    from danceopd.world import sources
    from danceopd.world.files import SHIPPED, shipped_sources

    where = {"folder": Path("runs/sources")}
    refuse_unused(args, {"list": {}, "train": where | {"only": None}, "card": where})
    for name in args.only or ():
        if name not in sources.STAGES:
            raise UserError(f"no source {name!r}{did_you_mean(name, sources.STAGES)}")
    if args.action == "list":
        print("\n".join(f"{name:8s} {SHIPPED / name}.safetensors" for name in shipped_sources()))
        print(f"scores and how they were trained: {SHIPPED / 'README.md'}")
    elif args.action == "train":
        args.folder.mkdir(parents=True, exist_ok=True)
        for name in args.only or sources.STAGES:
            print(f"wrote {sources.train_source(name, args.folder)}")
    else:
        print(f"wrote {sources.write_card(args.folder)}")
