"""`danceopd evaluate gedit` and `danceopd evaluate reward`: their arguments, and what they call."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from danceopd.support.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def add_gedit(commands) -> None:
    """Register `evaluate gedit` with the parsers of the commands."""
    command = commands.add_parser(
        "evaluate gedit", help="edit GEdit-Bench's pictures with a model, and have them judged"
    )
    command.add_argument("dataset", type=Path, help="GEdit-Bench: a folder of save_to_disk, or of its parquet files")
    command.add_argument("-o", "--output", type=Path, required=True, help="folder of the pictures and scores")
    command.add_argument("--method", help="the name that the pictures lie under (the LoRA's or model's without)")
    command.add_argument("--model", type=Path, help="an editing pipeline's folder; without, pictures are only judged")
    command.add_argument("--lora", type=Path, help="on its transformer: a file or folder, such as a run's student")
    command.add_argument("--transformer", type=Path, help="in its transformer's place: a folder of save_pretrained")
    command.add_argument("--resolution", type=int, default=1024, help="sides of a square edit in pixels (%(default)s)")
    command.add_argument("--num-inference-steps", type=int, help="solver steps (the pipeline's own number without)")
    command.add_argument("--guidance-scale", type=float, help="(the pipeline's own without)")
    command.add_argument("--seed", type=int, default=0, help="of the noise, with each row's key (%(default)s)")
    command.add_argument("--kinds", nargs="+", default=["paper"], help="of edits: paper (six), all (eleven), or names")
    command.add_argument("--language", nargs="+", default=["en"], choices=("en", "cn"), help="(en)")
    command.add_argument("--subset", default="fullset", choices=("fullset", "intersection"), help="(%(default)s)")
    command.add_argument("--judge-url", metavar="URL", help="of an OpenAI-compatible endpoint, usually ending in /v1")
    command.add_argument("--judge-model", metavar="NAME", help="the model's name there")
    command.add_argument("--judge", type=Path, metavar="FOLDER", help="a Qwen2.5-VL, to judge on this machine instead")
    command.add_argument("--parallel", type=int, default=8, help="questions to the endpoint at a time (%(default)s)")
    command.add_argument("--requests-per-minute", type=float, help="most requests to the endpoint")
    command.add_argument("--timeout", type=float, default=120.0, help="seconds for an answer (%(default)g)")
    command.add_argument("--max-calls", type=int, help="budget: requests to the endpoint")
    command.add_argument("--max-tokens", type=int, help="budget: tokens, as the endpoint counts them")
    command.add_argument("--batch-size", type=int, default=4, help="edits at a time of a local judge (%(default)s)")
    add_device(command)
    command.set_defaults(run=run_gedit)


def add_reward(commands) -> None:
    """Register `evaluate reward` with the parsers of the commands."""
    command = commands.add_parser("evaluate reward", help="CLIP, aesthetic and preference scores of drawn pictures")
    command.add_argument("pictures", type=Path, help="a folder in GenEval's layout, such as `evaluate geneval` draws")
    command.add_argument("--base", type=Path, help="the base model's pictures for the same prompts")
    command.add_argument("--teacher", type=Path, help="the teacher's: with both, the share of the gap that is closed")
    command.add_argument("--clip", type=Path, metavar="FOLDER", help="a CLIPModel's folder: CLIP score")
    command.add_argument("--pickscore", type=Path, metavar="FOLDER", help="PickScore's folder")
    command.add_argument("--hps", type=Path, metavar="FOLDER", help="HPSv2's, converted to a CLIPModel's folder")
    command.add_argument("--aesthetic", type=Path, metavar="FOLDER", help="the CLIP of an aesthetic head")
    command.add_argument("--aesthetic-head", type=Path, metavar="FILE", help="the head, as safetensors")
    command.add_argument("--batch-size", type=int, default=16, help="(%(default)s)")
    command.add_argument("--json", type=Path, help="write the results there")
    add_device(command)
    command.set_defaults(run=run_reward)


def add_device(command) -> None:
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    command.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the models' weights (%(default)s)")


def run_gedit(args: argparse.Namespace) -> int:
    """`danceopd evaluate gedit`; 1 where some edits have no score."""
    checks = {
        "--resolution": args.resolution,
        "--num-inference-steps": args.num_inference_steps,
        "--parallel": args.parallel,
        "--requests-per-minute": args.requests_per_minute,
        "--timeout": args.timeout,
        "--max-calls": args.max_calls,
        "--max-tokens": args.max_tokens,
        "--batch-size": args.batch_size,
    }
    if bad := [name for name, value in checks.items() if value is not None and value <= 0]:
        raise UserError(f"{', '.join(bad)} must be positive")
    if bool(args.judge_url) != bool(args.judge_model):
        raise UserError("--judge-url and --judge-model go together")
    if args.judge_url and args.judge:
        raise UserError("give one judge: --judge-url with --judge-model, or --judge")
    if not (args.model or args.judge_url or args.judge):
        raise UserError("nothing to do: give --model to draw edits, and --judge-url or --judge to have them scored")
    if (args.lora or args.transformer) and not args.model:
        raise UserError("--lora and --transformer belong to a --model")
    named = args.lora or args.transformer or args.model
    method = args.method or (named and _name_of(named))
    if not method:
        raise UserError("give --method, the folder in the output whose pictures are to be scored")

    import torch

    from danceopd.evaluation.gedit.benchmark import kinds_of
    from danceopd.evaluation.gedit.draw import Drawing
    from danceopd.evaluation.gedit.endpoint import EndpointJudge
    from danceopd.evaluation.gedit.local_judge import LocalJudge
    from danceopd.evaluation.gedit.score import evaluate_gedit, format_summary
    from danceopd.support.ranks import torchruns

    kinds, ranks = kinds_of(args.kinds), torchruns()
    device, dtype = find_device(args.device), getattr(torch, args.dtype)
    make_judge = None
    if args.judge:
        make_judge = partial(LocalJudge, args.judge, device, dtype, args.batch_size)
    elif args.judge_url:
        share = {"per_minute": args.requests_per_minute, "max_calls": args.max_calls, "max_tokens": args.max_tokens}
        share = {name: None if value is None else value / ranks.size for name, value in share.items()}
        parallel = max(1, args.parallel // ranks.size)
        make_judge = partial(
            EndpointJudge, args.judge_url, args.judge_model, parallel=parallel, timeout=args.timeout, **share
        )
    try:
        results = evaluate_gedit(
            args.dataset,
            args.output,
            method,
            model=args.model,
            lora=args.lora,
            transformer=args.transformer,
            drawing=Drawing(args.resolution, args.num_inference_steps, args.guidance_scale, args.seed),
            make_judge=make_judge,
            judge_name=args.judge_model or (args.judge.resolve().name if args.judge else ""),
            kinds=kinds,
            languages=args.language,
            subset=args.subset,
            device=device,
            dtype=dtype,
            ranks=ranks,
        )
    except UserError as error:
        if ranks.rank:  # else only rank 0's are printed
            print(f"rank {ranks.rank}: {error}", file=sys.stderr)
        raise
    if ranks.rank:
        return 0
    if results is None:
        print(f"pictures: {args.output / method}")
        return 0
    print(format_summary(results["scores"]))
    for row in results["unscored"]:
        print(f"no score: {row['kind']}/{row['language']}/{row['key']}: {row['problem']}", file=sys.stderr)
    if results["unscored"]:
        print(
            f"{len(results['unscored'])} edits have no score and are left out; run again to ask again", file=sys.stderr
        )
    print(f"wrote {results['place']}")
    return 1 if results["unscored"] else 0


def run_reward(args: argparse.Namespace) -> None:
    """`danceopd evaluate reward`."""
    if (args.base is None) != (args.teacher is None):
        raise UserError("--base and --teacher go together: the gap is between them")
    if (args.aesthetic is None) != (args.aesthetic_head is None):
        raise UserError("--aesthetic and --aesthetic-head go together")
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if not (args.clip or args.pickscore or args.hps or args.aesthetic):
        raise UserError("no reward: give --clip, --pickscore, --hps, or --aesthetic with --aesthetic-head")

    import torch

    from danceopd.evaluation import reward
    from danceopd.support.files import write_atomic

    where = {"device": find_device(args.device), "dtype": getattr(torch, args.dtype)}
    rewards = {}
    if args.clip:
        rewards["clip"] = partial(reward.clip_score, args.clip, **where)
    if args.pickscore:
        rewards["pickscore"] = partial(reward.pick_score, args.pickscore, **where)
    if args.hps:
        rewards["hps"] = partial(reward.hps_score, args.hps, **where)
    if args.aesthetic:
        rewards["aesthetic"] = partial(reward.aesthetic_score, args.aesthetic, args.aesthetic_head, **where)
    results = reward.evaluate_reward(rewards, args.pictures, args.base, args.teacher, args.batch_size)
    print(reward.format_rewards(results))
    if args.json:
        write_atomic(args.json, (json.dumps(results, indent=1) + "\n").encode())
        print(f"wrote {args.json}")


def find_device(name: str):
    """The device of this process: of several on a machine, its own card."""
    import os

    import torch

    from danceopd.support.devices import find_device as named

    device = named(name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def _name_of(path: Path) -> str:
    """What a checkpoint is called: a run's `student` as the run, a file without its ending."""
    path = path.resolve()
    named = path if path.is_dir() else path.with_suffix("")
    return named.parent.name if named.name in ("student", "adapter_model", "pytorch_lora_weights") else named.name
