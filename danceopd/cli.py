"""The command line: danceopd train | plan | evaluate | compare | sample | report | reproduce | sources | data."""

import argparse
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from danceopd.errors import Terminated, UserError
from danceopd.evaluation import model_commands
from danceopd.evaluation.compare_command import add_compare_arguments, run_compare
from danceopd.evaluation.geneval_command import add_geneval_arguments, run_geneval

DESCRIPTION = "Distil several flow-matching models into one student on its own trajectories (DanceOPD)."
EPILOG = """examples:
  danceopd train --config configs/demo.yaml                     train, or go on where a run stopped
  danceopd train --config configs/demo.yaml training.max_steps=50 training.output_dir=runs/short
  danceopd train --config configs/demo.yaml --dry-run            what a run takes, and what it lacks
  danceopd plan --config configs/demo.yaml --gpus 8 --gpu h100   an estimate: does it fit, how long does it take
  danceopd report runs/demo                                      score every row, write report.html
  danceopd export runs/model -o my_lora                          the student, for the plain diffusers pipeline
  danceopd reproduce A                                           six methods at equal cost, in half an hour
  danceopd evaluate runs/demo/student.safetensors --json row.json
  danceopd evaluate gedit GEDIT --model MODEL --lora my_lora -o results --judge-url URL --judge-model NAME
  danceopd sample base "a photo of a red car and a blue cup" -o cups.png
  danceopd sources                                               the networks that ship with the package
  danceopd data check my_data/manifest.jsonl                     every problem of a manifest, by line
"""


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("danceopd", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train a student as a configuration says")
    add_train_arguments(command)
    command.set_defaults(run=run_train)

    command = commands.add_parser("plan", help="estimate whether a run fits on so many cards, and how long it takes")
    command.add_argument("--config", type=Path, required=True, help="a YAML file, for example configs/demo.yaml")
    command.add_argument("--gpus", type=int, required=True, help="cards, 8 in a machine")
    command.add_argument(
        "--gpu", choices=("h100", "h100-pcie", "a100", "a100-40"), default="h100", help="the card (%(default)s)"
    )
    command.add_argument("--deepspeed", type=Path, metavar="JSON", help="DeepSpeed's settings: sizes of its buckets")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example training.batch_size=64")
    command.set_defaults(run=run_plan)

    command = commands.add_parser("evaluate", help="score any checkpoint on the picture world")
    command.add_argument("checkpoint", help="a .safetensors file, or the name of an embedded network")
    command.add_argument("--json", type=Path, help="write the row there")
    command.add_argument("--seed", type=int, default=1234, help="seed of prompts, placements and noise (%(default)s)")
    command.add_argument("--name", help="the row's name (the file's name without)")
    command.add_argument("--per-task", type=int, default=100, help="pictures per GenEval task (%(default)s)")
    command.add_argument("--per-kind", type=int, default=100, help="pictures per edit kind (%(default)s)")
    command.add_argument("--pictures", type=Path, help="keep GenEval's pictures in this new folder, for compare")
    add_sampling_arguments(command)
    command.set_defaults(run=run_evaluate)

    command = commands.add_parser(
        "evaluate geneval", help="GenEval of a diffusers model, or of pictures that are there"
    )
    add_geneval_arguments(command)
    command.set_defaults(run=run_geneval)

    command = commands.add_parser(
        "compare", help="runs of GenEval or GEdit-Bench, paired by prompt and seed, and their pictures"
    )
    add_compare_arguments(command)
    command.set_defaults(run=run_compare)

    model_commands.add_gedit(commands)
    model_commands.add_reward(commands)

    command = commands.add_parser("sample", help="draw or edit pictures with a checkpoint")
    command.add_argument("checkpoint", help="a .safetensors file, or the name of an embedded network")
    command.add_argument("prompts", nargs="+", help='for example "a photo of two cats", or "add a red cup"')
    command.add_argument("--source", type=Path, help="the picture to edit, of any size")
    command.add_argument("-o", "--output", type=Path, default=Path("sample.png"), help="PNG to write (%(default)s)")
    command.add_argument("--count", type=int, default=4, help="pictures per prompt (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    add_sampling_arguments(command)
    command.set_defaults(run=run_sample)

    command = commands.add_parser(
        "report", help="score a run, or measure a model's gaps; write results.json and report.html"
    )
    command.add_argument("folder", type=Path, help="the output_dir of a training")
    command.set_defaults(run=run_report)

    command = commands.add_parser("export", help="write a run's student as diffusers, ComfyUI or kohya's tools load it")
    command.add_argument("folder", type=Path, help="the output_dir of a training on a diffusers model")
    command.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    command.add_argument("--merge", action="store_true", help="the whole transformer, with the adapter in its weights")
    command.add_argument(
        "--layout", default="diffusers", choices=("diffusers", "comfyui", "kohya"), help="(%(default)s)"
    )
    command.set_defaults(run=run_export)

    command = commands.add_parser("merge-loras", help="distil several LoRAs into one, from prompts alone")
    command.add_argument("--base", type=Path, required=True, help="the diffusers pipeline's folder of all LoRAs")
    command.add_argument("--lora", type=Path, action="append", required=True, help="a LoRA; give it for each of them")
    command.add_argument("--prompts", type=Path, required=True, help="a prompt, or LORA<TAB>prompt, a line")
    command.add_argument("-o", "--output", type=Path, required=True, help="the .safetensors file to write")
    command.add_argument("--trigger", action="append", default=[], metavar="LORA=WORDS", help="in front of its prompts")
    command.add_argument("--rank", type=int, help="of the result (the largest of the LoRAs')")
    command.add_argument("--steps", type=int, default=1000, help="updates (%(default)s)")
    command.add_argument("--resolution", type=int, default=1024, help="sides of the pictures (%(default)s)")
    command.add_argument("--guidance-scale", type=float, default=1.0, help="that all are drawn with (%(default)s)")
    command.add_argument("--work", type=Path, help="folder of the encoded prompts and the run (OUTPUT.work)")
    command.add_argument("--overwrite", action="store_true", help="start again where another run lies")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example training.batch_size=8")
    command.set_defaults(run=run_merge_loras)

    command = commands.add_parser("reproduce", help="make the paper's tables and ablations on the picture world")
    command.add_argument("setting", help="A, B, C, D, E, F, ablations, grid (learning rates) or all")
    command.add_argument("--budget", choices=("quick", "paper"), default="quick", help="(%(default)s)")
    command.add_argument("--seeds", type=int, help="trainings of each row (quick 1, paper 3)")
    command.add_argument("--workers", type=int, help="runs at a time (as many as there are cores)")
    command.add_argument("--configs", type=Path, default=Path("configs"), help="the settings' files (%(default)s)")
    command.add_argument("--work", type=Path, help="folder of the runs (runs/reproduce/BUDGET)")
    command.add_argument("--results", type=Path, help="folder of the tables (results; quick: WORK/results)")
    command.add_argument("--again", action="store_true", help="make finished runs anew")
    command.set_defaults(run=run_reproduce)

    command = commands.add_parser("sources", help="list the embedded networks, or train them again")
    command.add_argument("action", nargs="?", choices=("list", "train", "card"), default="list")
    command.add_argument("--only", nargs="+", metavar="NAME", help="these networks only")
    command.add_argument("--folder", type=Path, default=Path("runs/sources"), help="where to train (%(default)s)")
    command.set_defaults(run=run_sources)

    command = commands.add_parser("data", help="check a manifest, or write the picture world as one")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="list every problem of a manifest and its pictures, by line")
    check.add_argument(
        "manifest", type=Path, help="JSONL or CSV: id, task, prompt, source_image (or a list), target_image"
    )
    check.add_argument("--root", type=Path, help="the folder of the pictures (the manifest's own without)")
    check.add_argument("--needs-source", nargs="*", default=(), metavar="TASK", help="tasks that must have sources")
    check.set_defaults(run=run_data_check)
    prepare = actions.add_parser("prepare", help="encode a manifest's prompts and pictures once, for training")
    prepare.add_argument("manifest", type=Path)
    prepare.add_argument("--model", type=Path, required=True, help="a diffusers pipeline's folder: its encoders")
    prepare.add_argument("--cache", type=Path, required=True, help="folder of encodings; manifests may share it")
    prepare.add_argument("--resolution", type=int, default=1024, help="pictures of its square in pixels (%(default)s)")
    prepare.add_argument("--root", type=Path, help="the folder of the pictures (the manifest's own without)")
    prepare.add_argument("--needs-source", nargs="*", default=(), metavar="TASK", help="tasks that must have sources")
    prepare.add_argument("--batch-size", type=int, default=8)
    prepare.add_argument("--workers", type=int, default=4, help="threads that read pictures (%(default)s)")
    prepare.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    prepare.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of encoders")
    prepare.add_argument("--strict", action="store_true", help="stop at problems instead of leaving rows out")
    prepare.set_defaults(run=run_data_prepare)
    imported = actions.add_parser("import", help="write a Hugging Face data set on disk as pictures and a manifest")
    imported.add_argument("folder", type=Path, help="written by save_to_disk")
    imported.add_argument("out", type=Path)
    imported.add_argument("--split", default="train", help="of several (%(default)s)")
    imported.add_argument("--task", help="of every row, where the data set has no such column")
    imported.set_defaults(run=run_data_import)
    write = actions.add_parser("world", help="write pictures of the world as PNGs with a manifest")
    write.add_argument("folder", type=Path)
    write.add_argument("--size", type=int, default=1000, help="samples per capability (%(default)s)")
    write.add_argument("--seed", type=int, default=0)
    write.add_argument("--capabilities", nargs="+", default=["t2i", "edit"])
    write.set_defaults(run=run_data_world)
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, for example configs/demo.yaml")
    parser.add_argument("--overwrite", action="store_true", help="start again where a finished or other run lies")
    parser.add_argument(
        "--dry-run", action="store_true", help="load no weight: check files, count parameters, memory and evaluations"
    )
    parser.add_argument(
        "--deepspeed", type=Path, metavar="JSON", help="DeepSpeed's settings (with several processes: ZeRO stage 3)"
    )
    parser.add_argument(
        "--patience", type=float, default=900, metavar="SECONDS", help="until a process counts as hung (%(default)g)"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed gives it
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example training.max_steps=4")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-inference-steps", type=int, default=16, help="solver steps (%(default)s)")
    parser.add_argument("--shift", type=float, default=5.0, help="shift of the noise levels (%(default)s)")
    parser.add_argument("--solver", choices=("euler", "heun", "ab2"), default="euler")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 is without guidance (%(default)s)")


def run_train(args: argparse.Namespace) -> int | None:
    from danceopd.config import load_config

    if args.dry_run:
        from danceopd.training.dry_run import dry_run

        plan = dry_run(load_config(args.config, args.overrides))
        print(plan.text())
        return 2 if plan.problems else 0
    from danceopd.training.launch import Watch, begin, guard
    from danceopd.training.loop import train

    config = load_config(args.config, args.overrides)
    ranks, settings = begin(args.deepspeed, config.training.device, args.patience)
    watch = Watch(ranks, args.patience)
    folder = guard(ranks, config.training.output_dir, train, config, args.overwrite, ranks, settings, watch.at)
    if ranks.rank:
        return
    print(f"student: {folder / ('student' if config.model else 'student.safetensors')}")
    print(f"log:     {folder / 'log.jsonl'}\nnext:    danceopd report {folder}")
    if config.model:
        print(f"         danceopd export {folder} -o FOLDER")


def run_plan(args: argparse.Namespace) -> int:
    from danceopd.config import load_config
    from danceopd.plan import plan
    from danceopd.training.zero import read_deepspeed

    if args.gpus < 1:
        raise UserError("--gpus must be at least 1")
    settings = read_deepspeed(args.deepspeed) if args.deepspeed else None
    planned = plan(load_config(args.config, args.overrides), args.gpus, args.gpu, settings)
    print(planned.text())
    return 2 if planned.plan.problems else 0


def _field_and_sampler(args: argparse.Namespace):
    from danceopd.checkpoint import load_model, resolve_weights
    from danceopd.evaluation.run import as_field
    from danceopd.evaluation.world import Sampler
    from danceopd.schedule import sigma_grid

    network = load_model(resolve_weights(args.checkpoint))
    try:
        sigmas = sigma_grid(args.num_inference_steps, args.shift)
    except ValueError as error:
        raise UserError(str(error)) from None
    size = network.config
    sampler = Sampler(sigmas, args.solver, text_length=size.text_length, image_size=size.image_size)
    return as_field(network, args.guidance_scale), sampler


def run_evaluate(args: argparse.Namespace) -> None:
    from danceopd.checkpoint import write_atomic
    from danceopd.evaluation.report import format_table
    from danceopd.evaluation.world import score_row

    if args.per_task < 1 or args.per_kind < 1:
        raise UserError("--per-task and --per-kind must be at least 1")
    field, sampler = _field_and_sampler(args)
    name = args.name or Path(args.checkpoint).stem
    row = score_row(name, field, sampler, args.seed, args.per_task, args.per_kind, pictures=args.pictures)
    print(format_table({"rows": [row]}))
    if args.json:
        write_atomic(args.json, (json.dumps(row, indent=1) + "\n").encode())
        print(f"wrote {args.json}")


def run_sample(args: argparse.Namespace) -> None:
    import torch

    from danceopd.data.manifest import load_picture
    from danceopd.training.log import save_grid

    field, sampler = _field_and_sampler(args)
    source = None
    if args.source:
        source = load_picture(args.source, sampler.image_size).expand(args.count, -1, -1, -1)
    rows = [] if source is None else [source]
    for prompt in args.prompts:
        rows.append(sampler(field, [prompt] * args.count, source, args.seed))
    save_grid(args.output, [torch.as_tensor(row) for row in rows], scale=6)
    print(f"wrote {args.output}")


def run_report(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from danceopd.evaluation.report import format_table
    from danceopd.evaluation.run import evaluate_run

    results = evaluate_run(args.folder, lambda rows: tqdm(rows, desc="evaluating", unit="part"))
    for warning in results["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(format_table(results))
    print("\n".join(f"wrote {args.folder / name}" for name in ("results.json", "report.html")))


def run_export(args: argparse.Namespace) -> None:
    from danceopd.export import export

    print(f"wrote {export(args.folder, args.output, args.merge, args.layout)}")


def run_merge_loras(args: argparse.Namespace) -> None:
    from danceopd.merge_loras import merge_loras

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
    import os
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


def run_sources(args: argparse.Namespace) -> None:
    from danceopd.checkpoint import SHIPPED, shipped_sources
    from danceopd.world import sources

    unknown = set(args.only or ()) - set(sources.STAGES)
    if unknown:
        raise UserError(f"no source {sorted(unknown)}; there are {', '.join(sources.STAGES)}")
    names = args.only or list(sources.STAGES)
    if args.action == "list":
        print("\n".join(f"{name:8s} {SHIPPED / name}.safetensors" for name in shipped_sources()))
        print(f"scores and how they were trained: {SHIPPED / 'README.md'}")
    elif args.action == "train":
        args.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            print(f"wrote {sources.train_source(name, args.folder)}")
    else:
        print(f"wrote {sources.write_card(args.folder)}")


def run_data_check(args: argparse.Namespace) -> int:
    from danceopd.data.manifest import check_manifest

    problems = check_manifest(args.manifest, args.root, tuple(args.needs_source))
    for problem in problems:
        print(problem)
    print(f"{args.manifest}: " + (f"{len(problems)} problems" if problems else "no problems"))
    return 1 if problems else 0


def run_data_prepare(args: argparse.Namespace) -> None:
    import torch

    from danceopd.backbones import backbone_of
    from danceopd.data.prepare import prepare
    from danceopd.training.setup import find_device

    if min(args.resolution, args.batch_size, args.workers) < 1:
        raise UserError("--resolution, --batch-size and --workers must be positive")
    done = prepare(
        args.manifest,
        args.model,
        args.cache,
        backbone_of(args.model),
        resolution=args.resolution,
        root=args.root,
        needs_source=args.needs_source,
        batch_size=args.batch_size,
        workers=args.workers,
        device=str(find_device(args.device)),
        dtype=getattr(torch, args.dtype),
        strict=args.strict,
    )
    for problem in done.problems:
        print(f"left out: {problem}")
    if done.damaged:
        print(f"mended: {len(done.damaged)} damaged shards, {', '.join(done.damaged[:3])}")
    print(f"{done.rows} rows in {done.path}: {done.made} entries encoded, {done.found} found")


def run_data_import(args: argparse.Namespace) -> None:
    from danceopd.data.huggingface import import_dataset

    path, count = import_dataset(args.folder, args.out, args.split, args.task)
    print(f"{count} rows: {path}")


def run_data_world(args: argparse.Namespace) -> None:
    from danceopd.data.world import write_world

    print(f"wrote {write_world(args.folder, args.capabilities, args.size, args.seed)}")


def guarded(function, args) -> int:
    """Run a command; what a user can mend is printed without a trace. Returns the exit status.

    That is 2 for a UserError, 130 after Ctrl-C and 143 after a TERM signal. Of several ranks one prints; before they
    have found each other, one of each machine.
    """
    rank = int(os.environ.get("RANK", "0"))
    first = rank == 0
    try:
        return function(args) or 0
    except KeyboardInterrupt as error:
        if "RANK" in os.environ:  # a launcher sends it to all once one has ended
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if first:
            print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    except (UserError, OSError) as error:
        if first:
            print(f"danceopd: {error}", file=sys.stderr)
        elif os.environ.get("LOCAL_RANK") == "0":
            import torch.distributed as dist

            if not dist.is_initialized():
                print(f"danceopd: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr)
        return 2


def _quiet() -> None:
    """What libraries say while they are imported (parts that nobody asked for and that are missing) helps no user."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("torchao", "torch.utils._pytree", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["evaluate"] and argv[1:2] and argv[1] in ("geneval", "gedit", "reward"):
        argv[:2] = [" ".join(argv[:2])]  # commands of their own beside `evaluate CHECKPOINT`
    args = build_parser().parse_args(argv)
    _quiet()
    return guarded(args.run, args)


if __name__ == "__main__":
    sys.exit(main())
