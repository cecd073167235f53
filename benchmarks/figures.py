"""Figures of the pages that are counted or computed, and need no clock.

python -m benchmarks.figures padding     # docs/rollout.md: steps filled up, by the sizes that they may have
python -m benchmarks.figures states      # docs/rollout.md: how far bf16 and FP8 move the states that may be asked
python -m benchmarks.figures lengths     # docs/lengths.md: padding of prompts in one forward and in groups
python -m benchmarks.figures fp8         # docs/fp8.md: bytes of the released transformers in bf16 and FP8
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import networks
from danceopd.config.reading import load_config
from danceopd.core.query import query
from danceopd.core.rollout import rollout
from danceopd.models.blocks import block_layers
from danceopd.models.fp8 import Fp8Linear, to_fp8
from danceopd.models.packing import split_by_length
from danceopd.planning.memory import nbytes
from danceopd.support.memory import GIB
from danceopd.training.loop import Trainer
from danceopd.world.build import build

Row = list[str]
PROMPTS = (20, 24, 31, 40, 55, 90, 160, 300)  # tokens
TRANSFORMERS: tuple[str, ...] = (
    "sd3.5-medium",
    "flux.1-dev",
    "flux.2-klein-4b",
    "flux.2-klein-9b",
    "flux.2-dev",
    "qwen-image",
    "z-image",
)


def parts(n: int, count: int) -> list[int]:
    """Sizes in equal parts of n samples."""
    return sorted({-(-n * i // count) for i in range(1, count + 1)})


def powers(n: int, *factors: float) -> list[int]:
    """Powers of two and their products with the factors, below n, and n."""
    return sorted({int(f * 2**i) for i in range(n.bit_length()) for f in (1, *factors) if f * 2**i < n} | {n})


def padding(steps: int = 16, batches: int = 1000) -> Iterator[Row]:
    """Evaluations of samples that have left, over all others: of one query a sample under low_t."""
    yield ["samples", "16 sizes", "8 sizes", "powers of two and 1.5 times", "powers of two"]
    for n in (8, 16, 32, 64):
        generator = torch.Generator().manual_seed(0)
        depths = [query(n, steps, generator, bias="low_t")[:, 0] for _ in range(batches)]
        under_way = [int(count) for depth in depths for i in range(steps) if (count := (depth > i).sum())]
        shares = []
        for sizes in (parts(n, 16), parts(n, 8), powers(n, 1.5), powers(n)):
            filled = sum(min(size for size in sizes if size >= count) for count in under_way)
            shares.append(filled / sum(under_way) - 1)
        yield [str(n), *(f"{100 * share:.1f} %" for share in shares)]


def states(samples: int = 32, steps: int = 16) -> Iterator[Row]:
    """Distance of the states of the shipped base's rollouts from those in float32, over a state's norm."""
    yield ["rollouts in", "mean", "19 of 20 at most", "largest"]
    for precision in ("bf16", "fp8"):
        with tempfile.TemporaryDirectory() as folder:
            changes = [
                "student.init_from=base",
                f"training.rollout_precision={precision}",
                f"training.output_dir={folder}",
            ]
            changes += [f"rollout.num_inference_steps={steps}", f"training.batch_size={samples}"]
            changes += [f"capabilities.{name}.data.size={samples}" for name in ("t2i", "edit")]
            config = load_config("configs/demo.yaml", changes)
            trainer = Trainer(config, build(config))
            batch, until = trainer.draw(), torch.arange(steps).expand(samples, -1)
            with torch.no_grad():
                found, own = (
                    rollout(network, batch.noise, batch.conditioning, trainer.sigmas, until)[0].flatten(2)
                    for network in (trainer.student, trainer.engine.student)
                )
        distance = (found - own).norm(dim=2) / own.norm(dim=2)
        shown = (distance.mean(), distance.quantile(0.95), distance.max())
        yield [precision, *(f"{100 * float(share):.2f} %" for share in shown)]


def lengths() -> Iterator[Row]:
    """Share of tokens that are padding, in one forward and in the groups of split_by_length."""
    yield ["tokens of a picture", "one forward", "in groups", "groups"]
    for picture in (1024, 4096):
        forwards = [[list(range(len(PROMPTS)))], split_by_length(PROMPTS, picture)]
        computed = [sum(len(group) * (picture + max(PROMPTS[i] for i in group)) for group in f) for f in forwards]
        wanted = len(PROMPTS) * picture + sum(PROMPTS)
        yield [str(picture), *(f"{100 * (1 - wanted / tokens):.1f} %" for tokens in computed), str(len(forwards[1]))]


def fp8() -> Iterator[Row]:
    """GiB of each transformer on the meta device, buffers included; also with the layers that modulate left in bf16."""
    import diffusers

    released = networks.released()
    yield ["transformer", "bf16, GiB", "FP8, GiB", "ratio", "with modulation kept in bf16"]
    for name in TRANSFORMERS:
        family, config, _ = released.MODELS[name]
        with torch.device("meta"):
            network = getattr(diffusers, released.CLASSES[family])(**config).bfloat16()
        plain, modulating = nbytes(network), {n for n, _, modulates in block_layers(network) if modulates}
        weights = sum(network.get_submodule(n).weight.nbytes for n in modulating)
        to_fp8(network)
        layers = [m for n, m in network.named_modules() if isinstance(m, Fp8Linear) and n in modulating]
        kept = nbytes(network) + weights - sum(m.weight.nbytes + m.weight_scale.nbytes for m in layers)
        sizes = [f"{size / GIB:.2f}" for size in (plain, nbytes(network))]
        yield [name, *sizes, f"{nbytes(network) / plain:.3f}", f"{kept / plain:.3f}"]


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "padding": padding,
    "states": states,
    "lengths": lengths,
    "fp8": fp8,
}


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    head, *rows = PARTS[parser.parse_args(argv).part]()
    for line in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(line)} |")
    return rows


if __name__ == "__main__":
    main()
