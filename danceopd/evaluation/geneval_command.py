"""`danceopd evaluate geneval`: draw the benchmark's pictures, score them, or sum up results that are there."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from danceopd.checkpoint import write_atomic
from danceopd.errors import UserError

DESCRIPTION = """GenEval (github.com/djghosh13/geneval): with --model its pictures are drawn into FOLDER, with
--detector those in FOLDER are scored, whatever drew them; both may be one command, in one process or in torchrun's."""
EPILOG = """examples:
  danceopd evaluate geneval out --metadata evaluation_metadata.jsonl --model MODEL --lora my_lora \\
      --detector mask2former-swin-small-coco-instance --clip clip-vit-large-patch14
  torchrun --nproc_per_node 8 -m danceopd evaluate geneval out --metadata evaluation_metadata.jsonl --model MODEL
  danceopd evaluate geneval --results out/results.jsonl
"""


def add_geneval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, nargs="?", help="pictures in GenEval's layout: 00000/samples/0000.png")
    parser.add_argument(
        "--results", type=Path, help="where results go (FOLDER/results.jsonl), or of no FOLDER come from"
    )
    parser.add_argument("--metadata", type=Path, help="GenEval's evaluation_metadata.jsonl: what is drawn, or was")
    parser.add_argument("--model", type=Path, help="the diffusers pipeline's folder that draws")
    parser.add_argument("--transformer", type=Path, help="a folder of another transformer for it, as of export --merge")
    parser.add_argument("--lora", type=Path, help="a LoRA for it, as of export")
    parser.add_argument("--samples", type=int, default=4, help="pictures of a prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--num-inference-steps", type=int, help="(the pipeline's own)")
    parser.add_argument("--guidance-scale", type=float, help="(the pipeline's own)")
    parser.add_argument("--resolution", type=int, help="sides of the pictures in pixels (the pipeline's own)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures at a time (%(default)s)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of the pipeline"
    )
    parser.add_argument(
        "--offload", action="store_true", help="for a pipeline that does not fit the card: a part at a time"
    )
    parser.add_argument("--detector", type=Path, help="a Mask2Former's folder, trained on COCO's instances: scores")
    parser.add_argument("--clip", type=Path, help="a CLIP's folder: names the colours of what was found")
    parser.add_argument("--max-overlap", type=float, default=1.0, help="of two boxes of a class (%(default)g: any)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run_geneval(args: argparse.Namespace) -> None:
    import torch

    from danceopd.evaluation.geneval import format_summary, read_metadata, read_results, summary
    from danceopd.evaluation.geneval_generate import Drawing, draw_pictures
    from danceopd.training.ranks import agreed, torchruns
    from danceopd.training.setup import find_device

    _check(args)
    if args.folder is None:
        print(format_summary(summary(read_results(args.results))))
        return
    metadata = read_metadata(args.metadata) if args.metadata else None
    ranks, device = torchruns(), find_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    elif args.offload:
        raise UserError("--offload is for a CUDA device; leave it out")
    if args.model:
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
        )
        drawn = agreed(ranks, draw_pictures, metadata, args.folder, how, ranks, _progress("drawing"))
        drawn = sum(ranks.gather(drawn))
        if ranks.rank == 0:
            print(f"{drawn} pictures drawn, {len(metadata) * args.samples - drawn} were there: {args.folder}")
    if args.detector:
        results = args.results or args.folder / "results.jsonl"
        records = score_folder(args, metadata, results, ranks, device)
        if ranks.rank == 0:
            print(f"{format_summary(summary(records))}\nwrote {results}")
    elif ranks.rank == 0:
        print(f"next: danceopd evaluate geneval {args.folder} --detector MASK2FORMER --clip CLIP")


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for what says too little or contradicts itself."""
    if args.folder is None:
        if args.model or args.detector or args.results is None:
            raise UserError("give the FOLDER of the pictures, or --results FILE alone to sum up results")
        return
    if not args.model and not args.detector:
        raise UserError("give --model to draw the pictures, --detector to score them, or both")
    if args.model and not args.metadata:
        raise UserError("--model draws the prompts of --metadata; give GenEval's evaluation_metadata.jsonl")
    if not args.model and (args.lora or args.transformer):
        raise UserError("--lora and --transformer belong to a --model")
    if args.samples < 1 or args.batch_size < 1 or not 0 < args.max_overlap <= 1:
        raise UserError("--samples and --batch-size must be at least 1, --max-overlap above 0 and at most 1")
    if min(args.num_inference_steps or 1, args.resolution or 1) < 1:
        raise UserError("--num-inference-steps and --resolution must be positive")


def _progress(what: str) -> Callable:
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=what, disable=os.environ.get("RANK", "0") != "0")


def score_folder(args: argparse.Namespace, metadata: list[dict] | None, results: Path, ranks, device) -> list[dict]:
    """Score each rank's prompts, write the results of all in the order of the pictures, and return them.

    Everything that a user can mend is said before the first picture is looked at. What is scored is kept beside the
    results, in results.scored, a file a prompt and a line a picture: after a kill the same call goes on from there.
    """
    from danceopd.evaluation.geneval import read_pictures, write_results
    from danceopd.evaluation.geneval_generate import contents
    from danceopd.evaluation.geneval_models import load_colors, load_detector
    from danceopd.training.ranks import agreed

    keep, keys, scored = results.with_suffix(".scored"), {}, {}  # the keys and lines of this rank's pictures

    def prepare():
        prompts = read_pictures(args.folder, metadata, args.samples if args.model else None)
        clauses = [c for p in prompts for key in ("include", "exclude") for c in p.metadata.get(key, [])]
        if any("color" in clause for clause in clauses) and not args.clip:
            raise UserError("some prompts ask for colours; give --clip, for example a folder of clip-vit-large-patch14")
        by = json.dumps([contents(args.detector), args.clip and contents(args.clip), args.max_overlap])
        for prompt in prompts[ranks.rank :: ranks.size]:
            keys.update({path: key_of(path, prompt.metadata, by) for path in prompt.pictures.values()})
            kept = read_kept(keep / f"{prompt.index:05d}.jsonl")
            for path in prompt.pictures.values():
                if keys[path] in kept:
                    scored[path] = kept[keys[path]] | {"filename": str(path)}
        if len(scored) == len(keys):
            return prompts, None, None
        detect = load_detector(args.detector, device, {clause["class"] for clause in clauses})
        return prompts, detect, load_colors(args.clip, device) if args.clip else None

    prompts, detect, name_colors = agreed(ranks, prepare)
    if ranks.rank == 0 and len({len(prompt.pictures) for prompt in prompts}) > 1:
        print("warning: prompts have different numbers of pictures; those with more weigh more in their tag")
    before = sum(ranks.gather(len(scored)))

    def score():
        for prompt in _progress("scoring")(prompts[ranks.rank :: ranks.size]):
            paths = list(prompt.pictures.values())
            if left := [path for path in paths if path not in scored]:
                lines = score_pictures(prompt.metadata, left, detect, name_colors, args.max_overlap)
                scored.update(zip(left, lines, strict=True))
                kept = [json.dumps({"key": keys[path], "record": scored[path]}) + "\n" for path in paths]
                write_atomic(keep / f"{prompt.index:05d}.jsonl", "".join(kept).encode())
        return scored

    everything: dict[Path, dict] = {}
    for part in ranks.gather(agreed(ranks, score)):
        everything |= part
    records = [everything[path] for prompt in prompts for path in prompt.pictures.values()]
    if ranks.rank == 0:
        write_results(results, records)
        print(f"{len(records) - before} pictures scored, {before} were before: {args.folder}")
    return records


def key_of(picture: Path, metadata: dict, by: str) -> str:
    """Names all that a verdict depends on: the picture's bytes, its prompt, and what looks at it."""
    digest = hashlib.blake2b(json.dumps([by, metadata]).encode(), digest_size=16)
    digest.update(picture.read_bytes())
    return digest.hexdigest()


def read_kept(file: Path) -> dict[str, dict]:
    """The lines of a prompt's results by key_of, as score_folder keeps them; one that is torn is none."""
    kept = {}
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
            if isinstance(entry["record"]["correct"], bool):
                kept[entry["key"]] = entry["record"]
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def score_pictures(
    metadata: dict, paths: list[Path], detect: Callable, name_colors: Callable | None, max_overlap: float = 1.0
) -> list[dict]:
    """The results' lines of a prompt's pictures, in their order. Raises UserError for a picture that is damaged."""
    from functools import partial

    from PIL import Image, ImageOps

    from danceopd.evaluation.geneval import judge, kept, record

    pictures = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                pictures.append(ImageOps.exif_transpose(opened).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it and draw it again") from None
    lines = []
    for path, picture, found in zip(paths, pictures, detect(pictures), strict=True):
        objects = {name: kept(found[name], metadata["tag"], max_overlap) for name in found}
        correct, reason = judge(metadata, objects, partial(name_colors, picture) if name_colors else None)
        lines.append(record(path, metadata, objects, correct, reason))
    return lines
