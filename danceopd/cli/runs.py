"""Commands on runs: `danceopd report`, `export`, `merge-loras` and `reproduce`."""

import argparse
import os
import sys
from pathlib import Path

from danceopd.cli.arguments import (
    add_command,
    add_max_sequence_length,
    add_resolution,
    fill_sizes,
    output_folder,
    real,
    whole,
)
from danceopd.reproduce.matrix import BUDGETS, SETTINGS
from danceopd.support.bars import bar


def add_report(commands) -> None:
    """Adds `danceopd report`."""
    parser = add_command(
        commands,
        "report",
        run_report,
        "score a run, or measure a model's velocity errors; write results.json and report.html",
        shows_bar=True,
        example="danceopd report runs/demo",
    )
    parser.add_argument("folder", type=Path, help="the run's folder (training.output_dir)")


def add_export(commands) -> None:
    """Adds `danceopd export`."""
    parser = add_command(
        commands,
        "export",
        run_export,
        "write a run's student as diffusers, ComfyUI or kohya's tools load it",
        example="danceopd export runs/model -o my_lora\ndanceopd export runs/model -o my_model --merge",
    )
    parser.add_argument("folder", type=Path, help="the folder of a run on a diffusers model (training.output_dir)")
    parser.add_argument(
        "-o", "--output", type=output_folder, required=True, metavar="FOLDER", help="a new folder to write into"
    )
    parser.add_argument(
        "--merge", action="store_true", help="write the whole transformer, with the adapter added to its weights"
    )
    parser.add_argument(
        "--layout",
        default="diffusers",
        choices=("diffusers", "peft", "comfyui", "kohya"),
        help="whose tools the file is for (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16", "fp8"),
        help="data type of the weights; fp8 needs --merge (default: fp32, with --merge the base's own)",
    )
    parser.add_argument(
        "--trigger",
        action="append",
        default=[],
        metavar="WORDS",
        help="words that call the LoRA, for its file and its description (default: those of the sources' files)",
    )


# Long: each of its options is said in full.
def add_merge_loras(commands) -> None:
    """Adds `danceopd merge-loras`."""
    parser = add_command(
        commands,
        "merge-loras",
        run_merge_loras,
        "distil several LoRAs of one model into one, from prompts alone",
        shows_bar=True,
        example="danceopd merge-loras ink.safetensors oil.safetensors --base MODEL -o merged.safetensors",
        description="Distil several LoRAs of one model into one, from prompts alone. LoRAs are told apart by their\n"
        "files' names (NAME). The exit status is 1 where the base or a plain average is better, or one of PEFT's\n"
        "merges is far better; docs/merging.md says how to judge the result.",
    )
    parser.set_defaults(models=())  # read with everything else, so that all mistakes are told at once
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="LORA | KEY=VALUE",
        help="two LoRAs or more, by file, folder or id of the hub; KEY=VALUE changes a key of the training's "
        "configuration, as training.batch_size=8 does",
    )
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        metavar="MODEL",
        help="the diffusers pipeline that the LoRAs are for: a folder, an id of the hub, or miniature",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the .safetensors file to write"
    )
    parser.add_argument(
        "--trigger",
        action="append",
        default=[],
        metavar="NAME=WORDS",
        help="the words that call a LoRA, to stand in front of a prompt or around {prompt}; NAME= for a LoRA that "
        "acts on every prompt (default: the words that its file names, or else its name)",
    )
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="strength of a LoRA, or of some layers of it by NAME:LAYERS=NUMBER (default: 1)",
    )
    parser.add_argument("--no-pairs", action="store_true", help="ask no prompts that call two LoRAs together")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a text file with a prompt a line; NAME<TAB>prompt is for one LoRA alone (default: 500 general prompts)",
    )
    parser.add_argument(
        "--rank", type=_rank, help="rank of the result, a number or auto (default: the largest of the LoRAs')"
    )
    parser.add_argument(
        "--layout",
        default="diffusers",
        choices=("diffusers", "comfyui", "kohya"),
        help="whose tools the file is for (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=whole(), default=1000, metavar="N", help="number of updates at most (default: %(default)s)"
    )
    parser.add_argument(
        "--patience",
        type=whole(),
        default=4,
        metavar="N",
        help="end after so many scorings without growth; 0 does every update (default: %(default)s)",
    )
    add_resolution(parser, "1024, of the miniature 64")
    add_max_sequence_length(parser)
    parser.add_argument(
        "--guidance-scale",
        type=real(),
        default=1.0,
        metavar="SCALE",
        help="the guidance that the LoRAs and the result are drawn with; 1 is without (default: %(default)g)",
    )
    parser.add_argument(
        "--work",
        type=output_folder,
        metavar="FOLDER",
        help="where the encoded prompts and the run are kept (default: OUTPUT.work)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start again where another run lies")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what it takes; write nothing")
    parser.add_argument(
        "--download", action="store_true", help="with --dry-run, download what is named by an id of the hub"
    )


def _rank(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or auto, not {text!r}") from None


def add_reproduce(commands) -> None:
    """Adds `danceopd reproduce`."""
    parser = add_command(
        commands,
        "reproduce",
        run_reproduce,
        "make the paper's tables and ablations on the picture world and the miniature",
        shows_bar=True,
        example="danceopd reproduce A",
    )
    parser.add_argument("setting", help=f"what is made: {', '.join(SETTINGS)} or all")
    parser.add_argument(
        "--budget",
        choices=("quick", "paper"),
        default="quick",
        help="quick trains briefly, to see that everything runs; paper trains in full (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=whole(1),
        metavar="N",
        help="trainings of each row, each from a seed of its own (default: quick 1, paper 3)",
    )
    parser.add_argument(
        "--workers", type=whole(1), metavar="N", help="trainings at a time (default: as many as there are cores)"
    )
    parser.add_argument(
        "--configs",
        type=Path,
        default=Path("configs"),
        metavar="FOLDER",
        help="the folder of the configurations (default: %(default)s)",
    )
    parser.add_argument(
        "--work", type=output_folder, metavar="FOLDER", help="where the runs are kept (default: runs/reproduce/BUDGET)"
    )
    parser.add_argument(
        "--results",
        type=output_folder,
        metavar="FOLDER",
        help="where the tables are written (default: results, of quick WORK/results)",
    )
    parser.add_argument("--again", action="store_true", help="train finished runs again")


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


def run_merge_loras(args: argparse.Namespace) -> int:
    """Merges LoRAs and prints how near the result is; returns 1 where it is not to be used."""
    from danceopd.tools.merge_loras import Options, merge_loras

    fill_sizes(args, args.base)
    changes = [text for text in args.inputs if _is_change(text)]
    options = Options(
        prompts=args.prompts,
        triggers=args.trigger,
        weights=args.weight,
        pairs=not args.no_pairs,
        rank=args.rank,
        steps=args.steps,
        patience=args.patience,
        resolution=args.resolution,
        max_sequence_length=args.max_sequence_length,
        guidance_scale=args.guidance_scale,
        layout=args.layout,
        work=args.work,
        overwrite=args.overwrite,
        overrides=changes,
    )
    loras = [Path(text).expanduser() for text in args.inputs if text not in changes]
    merged = merge_loras(args.base, loras, args.output, options, args.dry_run)
    if merged is None:
        return 0
    lines = merged.results.table()
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("share of the gap closed, along each one's own trajectories:")
    for first, *cells in lines:
        print("  " + first.ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths[1:], strict=True)))
    print("\n".join(filter(None, [merged.results.verdict, merged.results.advice])))
    print(f"wrote {merged.path}\nwrote {merged.page}")
    if merged.plain:
        print(f"wrote {merged.plain}: {merged.results.best}")
    return 0 if merged.results.better else 1


def _is_change(text: str) -> bool:
    """Tells a KEY=VALUE from a file whose name has a = in it."""
    return "=" in text and not Path(text).expanduser().exists() and not text.endswith(".safetensors")


def run_reproduce(args: argparse.Namespace) -> None:
    """Makes the runs of the tables that are not made yet, and writes the tables."""
    import shutil

    from danceopd.reproduce.run import Folders, chosen, reproduce
    from danceopd.training.stopping import term_interrupts

    settings, budget = chosen(args.setting), BUDGETS[args.budget]
    seeds = budget.seeds if args.seeds is None else args.seeds
    workers = os.cpu_count() or 1 if args.workers is None else args.workers
    work = args.work or Path("runs/reproduce") / budget.name
    results = args.results or (work / "results" if budget.name == "quick" else Path("results"))
    for setting in settings if args.again else ():
        shutil.rmtree(work / setting, ignore_errors=True)
        (results / f"{setting}.json").unlink(missing_ok=True)
    with term_interrupts():
        written = reproduce(settings, budget, Folders(args.configs, work, results), seeds, workers)
    print("\n".join(f"wrote {path}" for path in written))
