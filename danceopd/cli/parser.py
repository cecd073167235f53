"""The command line: danceopd train | plan | evaluate | compare | sample | report | reproduce | sources | data."""

import argparse
import sys
from pathlib import Path

from danceopd.cli import gedit_reward as model_commands
from danceopd.cli.compare import add_compare_arguments, run_compare
from danceopd.cli.data import run_data_check, run_data_import, run_data_prepare
from danceopd.cli.geneval import add_geneval_arguments, run_geneval
from danceopd.cli.runs import run_export, run_merge_loras, run_report, run_reproduce
from danceopd.cli.train import add_train_arguments, run_plan, run_train
from danceopd.cli.world import add_sampling_arguments, run_data_world, run_evaluate, run_sample, run_sources
from danceopd.support.exits import _quiet, guarded

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


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["evaluate"] and argv[1:2] and argv[1] in ("geneval", "gedit", "reward"):
        argv[:2] = [" ".join(argv[:2])]  # commands of their own beside `evaluate CHECKPOINT`
    args = build_parser().parse_args(argv)
    _quiet()
    return guarded(args.run, args)


if __name__ == "__main__":
    sys.exit(main())
