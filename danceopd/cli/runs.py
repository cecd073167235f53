"""Commands on the folder of a run."""

import argparse
import os
import sys
from pathlib import Path

from danceopd.support.errors import UserError


def run_report(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from danceopd.report.tables import format_table
    from danceopd.world.evaluate import evaluate_run

    results = evaluate_run(args.folder, lambda rows: tqdm(rows, desc="evaluating", unit="part"))
    for warning in results["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(format_table(results))
    print("\n".join(f"wrote {args.folder / name}" for name in ("results.json", "report.html")))


def run_export(args: argparse.Namespace) -> None:
    from danceopd.tools.export import export

    print(f"wrote {export(args.folder, args.output, args.merge, args.layout)}")


def run_merge_loras(args: argparse.Namespace) -> None:
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
    import shutil

    from danceopd.reproduce.matrix import BUDGETS
    from danceopd.reproduce.run import Place, chosen, reproduce

    settings, budget = chosen(args.setting), BUDGETS[args.budget]
    seeds, workers = args.seeds or budget.seeds, args.workers or os.cpu_count() or 1
    if seeds < 1 or workers < 1:
        raise UserError("--seeds and --workers must be at least 1")
    work = args.work or Path("runs/reproduce") / budget.name
    results = args.results or (work / "results" if budget.name == "quick" else Path("results"))
    for setting in settings if args.again else ():
        shutil.rmtree(work / setting, ignore_errors=True)
        (results / f"{setting}.json").unlink(missing_ok=True)
    written = reproduce(settings, budget, Place(args.configs, work, results), seeds, workers)
    print("\n".join(f"wrote {path}" for path in written))
