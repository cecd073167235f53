"""Sources that wait in host memory: bytes that cross to the device in one update, by the number of micro-batches.

    python benchmarks/stream_bench.py --micro-batches 1 2 4 --json results.json

Two sources with weights of their own are streamed block by block (training.offload_sources), as train_bench's small
SD3.5. Bytes are counted at each group of layers that is brought to the device; on a CPU nothing is copied, and the same
groups are counted. All updates take the same samples, so that their losses must agree.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.hooks.group_offloading import ModuleGroup

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common, train_bench
from benchmarks.networks import random_lora
from danceopd.config.reading import parse_config
from danceopd.models.backbones import sd3
from danceopd.models.lora_algebra import merge_into
from danceopd.support.memory import keep_freed_memory
from danceopd.training.assembly.build import build_model
from danceopd.training.loop import Trainer

SOURCES = train_bench.TEACHERS[:2]


@contextmanager
def uploaded() -> Iterator[dict[str, int]]:
    """Counts the bytes and the groups of layers that are brought to the device inside the block."""
    counted, onload = {"bytes": 0, "groups": 0}, ModuleGroup.onload_

    def counting(group: ModuleGroup) -> None:
        tensors = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
        tensors += [*group.parameters, *group.buffers]
        counted["bytes"] += sum({id(t): t.nbytes for t in tensors}.values())
        counted["groups"] += 1
        onload(group)

    ModuleGroup.onload_ = counting
    try:
        yield counted
    finally:
        ModuleGroup.onload_ = onload


def save_sources(model: Path, folder: Path, rank: int) -> int:
    """Transformers of their own weights, as folders; returns the bytes of one."""
    base = sd3.load_transformer(model)
    for seed, name in enumerate(SOURCES):
        merge_into(copy.deepcopy(base), random_lora(base, rank, seed)).save_pretrained(folder / f"own-{name}")
    return sum(t.nbytes for t in (*base.parameters(), *base.buffers()))


def trainer_of(model: Path, folder: Path, rank: int, batch_size: int, micro_batches: int) -> Trainer:
    rows = str(folder / "cache" / "rows.jsonl")
    training = train_bench.training_of(folder, batch_size, -(-batch_size // micro_batches))
    config = parse_config(
        {
            "model": str(model),
            "student": {"lora": {"rank": rank}},
            "sources": {name: {"weights": str(folder / f"own-{name}")} for name in SOURCES},
            "capabilities": {name: {"source": name, "task": "t2i", "data": {"prepared": rows}} for name in SOURCES},
            "training": training | {"offload_sources": True},
        }
    )
    return Trainer(config, build_model(config))


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=common.positive, default=4, help="samples of an update (%(default)s)")
    parser.add_argument("--micro-batches", type=common.positive, nargs="+", default=[1, 4])
    args = common.arguments(parser).parse_args(argv)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), train_bench.SIZES["small"]
        model = train_bench.save_pipeline(folder, size)
        held = save_sources(model, folder, size.rank)
        train_bench.save_rows(model, folder, size.side)
        trainers = {parts: trainer_of(model, folder, size.rank, args.batch_size, parts) for parts in args.micro_batches}
        found = {}
        for parts, trainer in trainers.items():
            with uploaded() as counted:
                found[parts] = counted | {"loss": trainer.update()["loss"]}
        times = common.interleaved(
            {parts: trainer.update for parts, trainer in trainers.items()}, args.rounds, clock=args.clock
        )
    rows = [
        common.row(
            "trainer",
            times[parts],
            settings={"micro-batches": parts},
            samples=args.batch_size,
            streamed_MB=figures["bytes"] / 1e6,
            groups=figures["groups"],
            one_source_MB=held / 1e6,
            loss=figures["loss"],
        )
        for parts, figures in found.items()
    ]
    return common.finish(common.result("streamed sources", rows, batch=args.batch_size), args)


if __name__ == "__main__":
    main()
