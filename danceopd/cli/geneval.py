"""`danceopd evaluate geneval`: draws the benchmark's pictures, scores them, or sums up results that are there."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from danceopd.cli.arguments import (
    MINIATURE,
    OWN,
    add_command,
    add_device,
    add_pipeline,
    add_resolution,
    fill_sizes,
    real,
    whole,
)
from danceopd.support.bars import bar
from danceopd.support.errors import UserError
from danceopd.support.texts import many

DESCRIPTION = """GenEval (github.com/djghosh13/geneval): with --model its pictures are drawn into FOLDER, with
--detector those in FOLDER are scored, whatever drew them; both may be one command, in one process or in torchrun's."""

EXAMPLE = """danceopd evaluate geneval out --metadata evaluation_metadata.jsonl --model MODEL --lora my_lora \\
    --detector mask2former-swin-small-coco-instance --clip clip-vit-large-patch14
torchrun --nproc_per_node 8 -m danceopd evaluate geneval out --metadata evaluation_metadata.jsonl --model MODEL
danceopd evaluate geneval --results out/results.jsonl"""


def add_geneval(commands) -> None:
    """Adds `danceopd evaluate geneval`."""
    parser = add_command(
        commands,
        "evaluate geneval",
        run_geneval,
        "draw and score GenEval's pictures with a diffusers model, or score pictures that are there",
        description=DESCRIPTION,
        shows_bar=True,
        example=EXAMPLE,
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="the pictures in GenEval's layout, as 00000/samples/0000.png"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="the file to write the scores into (default: FOLDER/results.jsonl); without a FOLDER, the file to sum up",
    )
    parser.add_argument(
        "--metadata",
        type=Path,
        metavar="FILE",
        help="GenEval's evaluation_metadata.jsonl: the prompts that are drawn, or were",
    )
    add_pipeline(parser)
    parser.add_argument(
        "--samples", type=whole(1), default=4, metavar="N", help="pictures of each prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=whole(1), default=4, metavar="N", help="pictures drawn at a time (default: %(default)s)"
    )
    add_resolution(parser, OWN)
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep one part of the pipeline at a time on the card, where all do not fit",
    )
    parser.add_argument(
        "--detector",
        type=Path,
        metavar="FOLDER",
        help="a Mask2Former trained on COCO's instances, to find the objects; miniature reads pictures of that world",
    )
    parser.add_argument(
        "--clip", type=Path, metavar="FOLDER", help="a CLIP model, which names the colours of what was found"
    )
    parser.add_argument(
        "--max-overlap",
        type=real(above=0, most=1),
        default=1.0,
        metavar="SHARE",
        help="of two boxes that overlap by more, one is dropped; 1 keeps all (default: %(default)g)",
    )
    add_device(parser)


def run_geneval(args: argparse.Namespace) -> None:
    """Draws, scores or sums up, as the arguments say."""
    from danceopd.evaluation.geneval.layout import read_metadata, read_results
    from danceopd.evaluation.geneval.summary import format_summary, summary
    from danceopd.support.devices import find_own_device
    from danceopd.support.ranks import torchruns

    _check(args)
    if args.folder is None:
        print(format_summary(summary(read_results(args.results))))
        return
    metadata = read_metadata(args.metadata) if args.metadata else None
    ranks, device = torchruns(), find_own_device(args.device)
    if device.type != "cuda" and args.offload:
        raise UserError("--offload is for a CUDA device; leave it out")
    if args.model:
        _draw(args, metadata, ranks, device)
    if args.detector:
        from danceopd.evaluation.geneval.score import score_folder  # imports transformers, which takes its time
        from danceopd.miniature.exact import MiniatureReader

        results = args.results or args.folder / "results.jsonl"
        records = score_folder(
            args.folder,
            results,
            MiniatureReader() if args.detector == MINIATURE else args.detector,
            args.clip,
            metadata=metadata,
            samples=args.samples if args.model else None,
            max_overlap=args.max_overlap,
            device=device,
            ranks=ranks,
            progress=_progress("scoring"),
        )
        if ranks.rank == 0:
            print(f"{format_summary(summary(records))}\nwrote {results}")
    elif ranks.rank == 0:
        print(f"next: danceopd evaluate geneval {args.folder} --detector MASK2FORMER --clip CLIP")


def _draw(args: argparse.Namespace, metadata: list[dict], ranks, device) -> None:
    import torch

    from danceopd.evaluation.geneval.draw import Drawing, draw_pictures
    from danceopd.support.ranks import agreed

    how = Drawing(
        model=args.model,
        transformer=args.transformer,
        lora=args.lora,
        samples=args.samples,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        resolution=args.resolution,
        batch_size=args.batch_size,
        device=device,
        dtype=getattr(torch, args.dtype),
        offload=args.offload,
        max_sequence_length=args.max_sequence_length,
    )
    drawn = agreed(ranks, draw_pictures, metadata, args.folder, how, ranks, _progress("drawing"))
    drawn = sum(ranks.gather(drawn))
    if ranks.rank == 0:
        print(f"{many(drawn, 'picture')} drawn, {len(metadata) * args.samples - drawn} were there: {args.folder}")


def _progress(what: str) -> Callable:
    return lambda items: bar(items, desc=what, disable=os.environ.get("RANK", "0") != "0")


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for arguments that say too little or contradict each other, or name what cannot be written."""
    from danceopd.support.files import check_writable

    if args.folder is None:
        if args.model or args.detector or args.results is None:
            raise UserError("give the FOLDER of the pictures, or --results FILE alone to sum up results")
        return
    if args.model:
        check_writable(args.folder)
    check_writable((args.results or args.folder / "results.jsonl").parent)
    fill_sizes(args, args.model, resolution=None)
    if not args.model and not args.detector:
        raise UserError("give --model to draw the pictures, --detector to score them, or both")
    if args.model and not args.metadata:
        raise UserError("--model draws the prompts of --metadata; give GenEval's evaluation_metadata.jsonl")
    if not args.model and (args.lora or args.transformer):
        raise UserError("--lora and --transformer belong to a --model")
