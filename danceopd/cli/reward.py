"""`danceopd evaluate reward`: CLIP, aesthetic and preference scores of pictures that are there."""

import argparse
import json
from functools import partial
from pathlib import Path

from danceopd.cli.arguments import add_command, add_device, output_file, whole
from danceopd.support.errors import UserError


def add_reward(commands) -> None:
    """Adds `danceopd evaluate reward`."""
    parser = add_command(
        commands,
        "evaluate reward",
        run_reward,
        "score drawn pictures by CLIP, aesthetics and preference models",
        shows_bar=True,
        example="danceopd evaluate reward out --clip CLIP --base out_base --source out_source",
    )
    parser.add_argument(
        "pictures", type=Path, help="a folder in GenEval's layout, as danceopd evaluate geneval writes it"
    )
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="the base model's pictures for the same prompts")
    parser.add_argument(
        "--source",
        type=Path,
        metavar="FOLDER",
        help="the source's pictures for the same prompts; with --base, the share of the gap that is closed is printed",
    )
    parser.add_argument("--clip", type=Path, metavar="FOLDER", help="a CLIP model; adds the CLIP score")
    parser.add_argument("--pickscore", type=Path, metavar="FOLDER", help="PickScore's model; adds its score")
    parser.add_argument(
        "--hps", type=Path, metavar="FOLDER", help="HPSv2's model, converted to a CLIPModel; adds its score"
    )
    parser.add_argument(
        "--aesthetic", type=Path, metavar="FOLDER", help="the CLIP model that an aesthetic head was trained on"
    )
    parser.add_argument(
        "--aesthetic-head", type=Path, metavar="FILE", help="the aesthetic head, as safetensors; adds its score"
    )
    parser.add_argument(
        "--batch-size", type=whole(1), default=16, metavar="N", help="pictures scored at a time (default: %(default)s)"
    )
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="a file to write the results into")
    add_device(parser)


def run_reward(args: argparse.Namespace) -> None:
    """Scores the pictures and prints a table of rewards."""
    if (args.base is None) != (args.source is None):
        raise UserError("--base and --source go together: the gap is between them")
    if (args.aesthetic is None) != (args.aesthetic_head is None):
        raise UserError("--aesthetic and --aesthetic-head go together")
    if not (args.clip or args.pickscore or args.hps or args.aesthetic):
        raise UserError("no reward: give --clip, --pickscore, --hps, or --aesthetic with --aesthetic-head")

    import torch

    from danceopd.evaluation import reward
    from danceopd.support.devices import find_own_device
    from danceopd.support.files import write_atomic

    where = {"device": find_own_device(args.device), "dtype": getattr(torch, args.dtype)}
    rewards = {}
    if args.clip:
        rewards["clip"] = partial(reward.clip_score, args.clip, **where)
    if args.pickscore:
        rewards["pickscore"] = partial(reward.pick_score, args.pickscore, **where)
    if args.hps:
        rewards["hps"] = partial(reward.hps_score, args.hps, **where)
    if args.aesthetic:
        rewards["aesthetic"] = partial(reward.aesthetic_score, args.aesthetic, args.aesthetic_head, **where)
    results = reward.evaluate_reward(rewards, args.pictures, args.base, args.source, args.batch_size)
    print(reward.format_rewards(results))
    if args.json:
        write_atomic(args.json, (json.dumps(results, indent=1) + "\n").encode())
        print(f"wrote {args.json}")
