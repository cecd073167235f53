"""Commands on runs: `danceopd report`, `export`, `merge-loras` and `reproduce`."""

import argparse
import os
import sys
from pathlib import Path

from danceopd.cli.arguments import add_command, add_overrides
from danceopd.support.bars import bar
from danceopd.support.errors import UserError


def add_report(commands) -> None:
    """Adds `danceopd report`."""
    parser = add_command(
        commands,
        "report",
        run_report,
        "score a run, or measure a model's velocity errors; write results.json and report.html",
    )
    parser.add_argument("folder", type=Path, help="the output_dir of a training")


def add_export(commands) -> None:
    """Adds `danceopd export`."""
    parser = add_command(
        commands, "export", run_export, "write a run's student as diffusers, ComfyUI or kohya's tools load it"
    )
    parser.add_argument("folder", type=Path, help="the output_dir of a training on a diffusers model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--merge", action="store_true", help="the whole transformer, with the adapter in its weights")
    parser.add_argument(
        "--layout", default="diffusers", choices=("diffusers", "peft", "comfyui", "kohya"), help="(%(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16", "fp8"),
        help="(fp32; with --merge the base's own; fp8 is for --merge)",
    )
    parser.add_argument(
        "--trigger", action="append", default=[], metavar="WORDS", help="for the file's metadata, beside the sources'"
    )


def add_merge_loras(commands) -> None:
    """Adds `danceopd merge-loras`."""
    parser = add_command(commands, "merge-loras", run_merge_loras, "distil several LoRAs into one, from prompts alone")
    parser.add_argument(
        "--base", type=Path, required=True, help="the diffusers pipeline of all LoRAs: a folder, or hub id"
    )
    parser.set_defaults(models=("base", "lora"))
    parser.add_argument("--lora", type=Path, action="append", required=True, help="a LoRA; give it for each of them")
    parser.add_argument("--prompts", type=Path, required=True, help="a prompt, or LORA<TAB>prompt, a line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--trigger", action="append", default=[], metavar="LORA=WORDS", help="in front of its prompts")
    parser.add_argument("--rank", type=int, help="of the result (the largest of the LoRAs')")
    parser.add_argument("--steps", type=int, default=1000, help="updates (%(default)s)")
    parser.add_argument("--resolution", type=int, default=1024, help="sides of the pictures (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="that all are drawn with (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder of the encoded prompts and the run (OUTPUT.work)")
    parser.add_argument("--overwrite", action="store_true", help="start again where another run lies")
    add_overrides(parser, "training.batch_size=8")


def add_reproduce(commands) -> None:
    """Adds `danceopd reproduce`."""
    parser = add_command(
        commands, "reproduce", run_reproduce, "make the paper's tables and ablations on the picture world"
    )
    parser.add_argument("setting", help="A, B, C, D, E, F, ablations, grid (learning rates) or all")
    parser.add_argument("--budget", choices=("quick", "paper"), default="quick", help="(%(default)s)")
    parser.add_argument("--seeds", type=int, help="trainings of each row (quick 1, paper 3)")
    parser.add_argument("--workers", type=int, help="runs at a time (as many as there are cores)")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="the settings' files (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder of the runs (runs/reproduce/BUDGET)")
    parser.add_argument("--results", type=Path, help="folder of the tables (results; quick: WORK/results)")
    parser.add_argument("--again", action="store_true", help="make finished runs anew")


def run_report(args: argparse.Namespace) -> None:
    """Scores a run, or measures how far a model's student is from its sources, and writes the report."""
    from danceopd.config.reading import read_run_config
    from danceopd.report.tables import format_table

    if read_run_config(args.folder).model:
        from danceopd.tools.model_report import evaluate_model_run as evaluate  # imports diffusers: takes its time
    else:
        from danceopd.world.evaluate import evaluate_run as evaluate
    results = evaluate(args.folder, lambda rows: bar(rows, desc="evaluating", unit="part"))
    for warning in results["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(format_table(results))
    print("\n".join(f"wrote {args.folder / name}" for name in ("results.json", "report.html")))


def run_export(args: argparse.Namespace) -> None:
    """Writes a run's student for other tools."""
    from danceopd.tools.export import export

    print(f"wrote {export(args.folder, args.output, args.merge, args.layout, args.dtype, args.trigger)}")


def run_merge_loras(args: argparse.Namespace) -> None:
    """Distils several LoRAs into one and prints how near it is to each."""
    from danceopd.tools.merge_loras import merge_loras

    merged = merge_loras(
        args.base,
        args.lora,
        args.prompts,
        args.output,
        triggers=args.trigger,
        rank=args.rank,
        steps=args.steps,
        resolution=args.resolution,
        guidance_scale=args.guidance_scale,
        work=args.work,
        overwrite=args.overwrite,
        overrides=args.overrides,
    )
    print("mean squared velocity error to each LoRA, on its prompts:")
    for name, errors in merged.errors.items():
        print(f"  {name}: " + ", ".join(f"{who} {error:.3g}" for who, error in errors.items()))
    print(f"wrote {merged.path}\nwrote {merged.grid}")


def run_reproduce(args: argparse.Namespace) -> None:
    """Makes the runs of the tables that are not made yet, and writes the tables."""
    import shutil

    from danceopd.reproduce.matrix import BUDGETS
    from danceopd.reproduce.run import Folders, chosen, reproduce

    settings, budget = chosen(args.setting), BUDGETS[args.budget]
    seeds, workers = args.seeds or budget.seeds, args.workers or os.cpu_count() or 1
    if seeds < 1 or workers < 1:
        raise UserError("--seeds and --workers must be at least 1")
    work = args.work or Path("runs/reproduce") / budget.name
    results = args.results or (work / "results" if budget.name == "quick" else Path("results"))
    for setting in settings if args.again else ():
        shutil.rmtree(work / setting, ignore_errors=True)
        (results / f"{setting}.json").unlink(missing_ok=True)
    written = reproduce(settings, budget, Folders(args.configs, work, results), seeds, workers)
    print("\n".join(f"wrote {path}" for path in written))
