"""`danceopd evaluate gedit`: edits GEdit-Bench's pictures with a model, and has them judged."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from danceopd.cli.arguments import (
    MINIATURE,
    add_command,
    add_device,
    add_pipeline,
    add_resolution,
    fill_sizes,
    output_folder,
    real,
    whole,
)
from danceopd.support.errors import UserError
from danceopd.support.texts import many


# Long: each of its options is said in full.
def add_gedit(commands) -> None:
    """Adds `danceopd evaluate gedit`."""
    parser = add_command(
        commands,
        "evaluate gedit",
        run_gedit,
        "edit GEdit-Bench's pictures with a model, and have them judged",
        shows_bar=True,
        example="danceopd evaluate gedit GEDIT --model MODEL -o results --judge-url URL --judge-model NAME",
    )
    parser.add_argument(
        "dataset", type=Path, help="GEdit-Bench: a folder written by save_to_disk, or a folder of its parquet files"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=output_folder,
        required=True,
        metavar="FOLDER",
        help="the folder to write pictures and scores into",
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="the folder of the pictures within the output (default: the name of the LoRA, or of the model)",
    )
    add_pipeline(parser)
    add_resolution(parser, "1024, of the miniature 64")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["paper"],
        metavar="KIND",
        help="the kinds of edits: paper for the paper's six, all for all eleven, or their names (default: paper)",
    )
    parser.add_argument(
        "--language",
        nargs="+",
        default=["en"],
        choices=("en", "cn"),
        help="languages of the instructions (default: en)",
    )
    parser.add_argument(
        "--subset",
        default="fullset",
        choices=("fullset", "intersection"),
        help="all edits, or the smaller subset that the data set marks (default: %(default)s)",
    )
    parser.add_argument(
        "--judge-url", metavar="URL", help="the judge's OpenAI-compatible endpoint, usually ending in /v1"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the judge's name at this endpoint")
    parser.add_argument(
        "--judge",
        type=Path,
        metavar="FOLDER",
        help="a Qwen2.5-VL that judges here in the place of an endpoint; miniature judges edits of that world",
    )
    parser.add_argument(
        "--parallel",
        type=whole(1),
        default=8,
        metavar="N",
        help="questions to the endpoint at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--requests-per-minute",
        type=real(above=0),
        metavar="N",
        help="most requests to the endpoint in a minute (default: any number)",
    )
    parser.add_argument(
        "--timeout",
        type=real(above=0),
        default=120.0,
        metavar="SECONDS",
        help="how long an answer of the endpoint is waited for (default: %(default)g)",
    )
    parser.add_argument(
        "--max-calls",
        type=whole(1),
        metavar="N",
        help="requests after which it ends (default: any number)",
    )
    parser.add_argument(
        "--max-tokens",
        type=whole(1),
        metavar="N",
        help="tokens, as the endpoint counts them, after which it ends (default: any number)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=4,
        metavar="N",
        help="edits that a local judge sees at a time (default: %(default)s)",
    )
    add_device(parser)


def run_gedit(args: argparse.Namespace) -> int:
    """Edits and judges; returns 1 where some edits have no score."""
    method = _check(args)

    import torch

    from danceopd.evaluation.gedit.benchmark import kinds_of
    from danceopd.evaluation.gedit.draw import Editing
    from danceopd.evaluation.gedit.score import evaluate_gedit, format_summary
    from danceopd.support.devices import find_own_device
    from danceopd.support.ranks import torchruns

    kinds, ranks = kinds_of(args.kinds), torchruns()
    device, dtype = find_own_device(args.device), getattr(torch, args.dtype)
    try:
        results = evaluate_gedit(
            args.dataset,
            args.output,
            method,
            model=args.model,
            lora=args.lora,
            transformer=args.transformer,
            editing=Editing(
                args.resolution,
                args.num_inference_steps,
                args.guidance_scale,
                args.seed,
                args.max_sequence_length,
            ),
            make_judge=_judge(args, device, dtype, ranks.size),
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
    unscored = results["unscored"]
    for row in unscored:
        print(f"no score: {row['kind']}/{row['language']}/{row['key']}: {row['problem']}", file=sys.stderr)
    if unscored:
        without = many(len(unscored), "edit")
        print(f"left out {without} without a score; the same command asks again", file=sys.stderr)
    print(f"wrote {results['place']}")
    return 1 if unscored else 0


def _check(args: argparse.Namespace) -> str:
    """Checks the arguments against each other; returns the name of the method."""
    fill_sizes(args, args.model)
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
    return method


def _judge(args: argparse.Namespace, device, dtype, processes: int) -> Callable | None:
    """Returns what makes the judge, its rate and budget shared by the processes; None where no judge is asked."""
    if args.judge == MINIATURE:
        from danceopd.miniature.exact import MiniatureJudge

        return MiniatureJudge
    if args.judge:
        from danceopd.evaluation.gedit.local_judge import LocalJudge

        return partial(LocalJudge, args.judge, device, dtype, args.batch_size)
    if not args.judge_url:
        return None
    from danceopd.evaluation.gedit.endpoint import EndpointJudge

    share = {"per_minute": args.requests_per_minute, "max_calls": args.max_calls, "max_tokens": args.max_tokens}
    share = {name: None if value is None else value / processes for name, value in share.items()}
    parallel = max(1, args.parallel // processes)
    return partial(EndpointJudge, args.judge_url, args.judge_model, parallel=parallel, timeout=args.timeout, **share)


def _name_of(path: Path) -> str:
    """Names a checkpoint: a run's `student` as the run, a file without its ending."""
    path = path.resolve()
    named = path if path.is_dir() else path.with_suffix("")
    return named.parent.name if named.name in ("student", "adapter_model", "pytorch_lora_weights") else named.name
