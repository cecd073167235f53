"""Commands on runs: `danceopd report`, `export`, `merge-loras` and `reproduce`."""

import argparse
import os
import sys
from pathlib import Path

from danceopd.cli.arguments import add_command, fill_sizes, output_folder
from danceopd.reproduce.matrix import BUDGETS, SETTINGS
from danceopd.support.bars import bar
from danceopd.support.errors import UserError


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
    parser.add_argument("folder", type=Path, help="the output_dir of a training")


def add_export(commands) -> None:
    """Adds `danceopd export`."""
    parser = add_command(
        commands,
        "export",
        run_export,
        "write a run's student as diffusers, ComfyUI or kohya's tools load it",
        example="danceopd export runs/model -o my_lora\ndanceopd export runs/model -o my_model --merge",
    )
    parser.add_argument("folder", type=Path, help="the output_dir of a training on a diffusers model")
    parser.add_argument("-o", "--output", type=output_folder, required=True, help="a new folder")
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
        "--trigger",
        action="append",
        default=[],
        metavar="WORDS",
        help="for metadata and card (as the sources' files say)",
    )


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
        help="files, folders or ids of the hub; and changes of the training, as training.batch_size=8",
    )
    parser.add_argument("--base", type=Path, required=True, help="the diffusers pipeline of all LoRAs: a folder or id")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument(
        "--trigger",
        action="append",
        default=[],
        metavar="NAME=WORDS",
        help="the words that call a LoRA, in front of prompts or around {prompt}; none: it acts on every prompt "
        "(as its file says; else its name)",
    )
    parser.add_argument("--weight", action="append", default=[], metavar="NAME=0.8", help="strength of a LoRA (1)")
    parser.add_argument("--no-pairs", action="store_true", help="ask no prompts with two triggers")
    parser.add_argument("--prompts", type=Path, help="a prompt, or NAME<TAB>prompt, a line (500 general ones)")
    parser.add_argument("--rank", type=_rank, help="rank of the result: a number or auto (the largest of the LoRAs')")
    parser.add_argument(
        "--layout",
        default="diffusers",
        choices=("diffusers", "comfyui", "kohya"),
        help="names of the file's keys (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=1000, help="most updates (%(default)s)")
    parser.add_argument(
        "--patience", type=int, default=4, help="scorings without growth until it ends; 0 for never (%(default)s)"
    )
    parser.add_argument("--resolution", type=int, help="sides of the pictures (1024; the miniature: 64)")
    parser.add_argument("--max-sequence-length", type=int, metavar="N", help="tokens of a prompt (the pipeline's own)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="that all are drawn with (%(default)s)")
    parser.add_argument("--work", type=output_folder, help="folder of the encoded prompts and the run (OUTPUT.work)")
    parser.add_argument("--overwrite", action="store_true", help="start again where another run lies")
    parser.add_argument("--dry-run", action="store_true", help="say what it takes; nothing of it is kept")
    parser.add_argument("--download", action="store_true", help="with --dry-run: download what is named by an id")


def _rank(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number or auto, not {text!r}") from None


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
    parser.add_argument("setting", help=f"{', '.join(SETTINGS)} or all")
    parser.add_argument("--budget", choices=("quick", "paper"), default="quick", help="(%(default)s)")
    parser.add_argument("--seeds", type=int, help="trainings of each row (quick 1, paper 3)")
    parser.add_argument("--workers", type=int, help="runs at a time (as many as there are cores)")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="the settings' files (%(default)s)")
    parser.add_argument("--work", type=output_folder, help="folder of the runs (runs/reproduce/BUDGET)")
    parser.add_argument("--results", type=output_folder, help="folder of the tables (results; quick: WORK/results)")
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
    if seeds < 1 or workers < 1:
        raise UserError("--seeds and --workers must be at least 1")
    work = args.work or Path("runs/reproduce") / budget.name
    results = args.results or (work / "results" if budget.name == "quick" else Path("results"))
    for setting in settings if args.again else ():
        shutil.rmtree(work / setting, ignore_errors=True)
        (results / f"{setting}.json").unlink(missing_ok=True)
    with term_interrupts():
        written = reproduce(settings, budget, Folders(args.configs, work, results), seeds, workers)
    print("\n".join(f"wrote {path}" for path in written))
