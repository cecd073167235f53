"""The host's time of one sample's query and of the student's forward and backward, with next to nothing to compute.

    python benchmarks/host_bench.py                # both, eager and in static passes, in bf16 or float32 and in FP8

The network is the card check's, in plain PyTorch with SD3's parts: as deep as SD3.5-medium, with as many heads and
second attentions, and 96 wide with a few tokens, on the CPU: what is left is what the host does for each operation.
Layers with adapters take the way that they take on a card, by plain PyTorch operations instead of one kernel. "static"
fills the buffers of a pass and replays its graphs; here a graph's replay does nothing at all, so that what launching it
costs a card's host is not in these figures (one launch of each graph, whatever it holds). Times are of the processor,
and so hold on a machine that others use.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common
from benchmarks.card import network
from danceopd.core.fields import counted, routed, within
from danceopd.core.forwards import SharedField
from danceopd.core.questions import Questions, matched
from danceopd.models.fp8 import to_fp8
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.students import LoraStudent
from danceopd.training.rollouts.static import StaticField
from danceopd.training.rollouts.trained import StaticStudent
from danceopd.training.rows import Rows, in_parts

SIZE = network.Size(96, 24, 24, 13, 4, 16, 4, 16)  # depth, heads and second attentions are SD3.5-medium's
RANK, SOURCES = 4, 4
ROWS = 16  # queries that a static step has room for


class NoPool:
    """Stands where a card's pool of graphs is: a capture runs as it does there, and a replay does nothing."""

    def graph(self) -> "NoPool":
        return self

    def capturing(self):
        return nullcontext()

    def into(self, graph):
        return nullcontext()

    def replay(self) -> None:
        pass


class Replayed(StaticField):
    """Asks in static steps, of which the first of each size is made and the others are replays that do nothing.

    It is not captured: on the CPU the samples' adapters are read on the host, as they are not on a card.
    """

    def _step(self, program, size: int) -> None:
        if size not in program.graphs:
            program.step(size)
            program.graphs[size] = ()


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """Makes layers with adapters take the products that they take on a card."""
    before = torch.compiler.is_compiling

    def asked() -> bool:
        return Path(sys._getframe(1).f_code.co_filename).parts[-2:] == ("danceopd_kernels", "lora.py") or before()

    torch.compiler.is_compiling = asked
    try:
        yield
    finally:
        torch.compiler.is_compiling = before


class Run:
    """A LoRA student and four LoRA sources on one base, eager or static, and one sample's query and match.

    Args:
        fp8: Whether the base's linear layers are in FP8.
        static: Whether both are asked by static passes.
    """

    def __init__(self, fp8: bool, static: bool):
        device = torch.device("cpu")
        base, loras = network.make(SIZE, device, torch.float32), []
        layers = target_layers(base, network.LORA_TARGETS)
        for _ in range(SOURCES):
            widths = {name: base.get_submodule(name).weight.shape for name in layers}
            drawn = {n: (torch.randn(RANK, w), torch.randn(out, RANK) / 10, 1.0) for n, (out, w) in widths.items()}
            loras.append(drawn)
        shared = SharedBase(to_fp8(base) if fp8 else base, loras, network.velocity, layers)
        self.student = LoraStudent(shared, layers, RANK, RANK, torch.Generator().manual_seed(1))

        def ask(latents, sigma, conditioning):
            return shared(latents, sigma, conditioning, conditioning.adapter)

        self.field, rows, spent = self.student, Rows(ROWS), Counter()
        field = counted(in_parts(ask, rows), spent, "sources")
        if static:
            self.field = StaticStudent(self.student, [self.student, base], NoPool())
            field = Replayed(field, ask, spent=spent, name="sources", rows=rows).once
        self.sources = [within(SharedField(shared, ask, m), lambda _: field) for m in range(SOURCES)]
        self.states, self.conditioning = network.samples(SIZE, ROWS, device)
        self.sigma = torch.linspace(0.9, 0.1, ROWS)
        self.route, self.sample = torch.arange(ROWS) % SOURCES, torch.arange(ROWS)
        self.answers = routed(self.sources, self.route, self.states, self.sigma, self.conditioning)

    def query(self) -> None:
        """Asks the sources of a batch; one forward of all, whose host time all samples share."""
        routed(self.sources, self.route, self.states, self.sigma, self.conditioning)

    def match(self) -> None:
        """Asks the student about one sample, with gradient, and goes back."""
        weight = torch.ones(ROWS)
        every = Questions(self.states, self.sigma, self.conditioning, self.route, self.sample, self.answers, weight)
        matched(self.field, every[:1]).loss.sum().backward()


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.arguments(parser).set_defaults(clock="cpu")
    args = parser.parse_args(argv)
    rows = []
    with as_on_a_card():
        for precision in ("float32", "fp8"):
            runs = {kind: Run(precision == "fp8", kind == "static") for kind in ("eager", "static")}
            for part in ("query", "match"):
                calls = {kind: getattr(run, part) for kind, run in runs.items()}
                times = common.interleaved(calls, args.rounds, clock=args.clock)
                for kind, taken in times.items():
                    over = ("eager", times["eager"]) if kind == "static" else None
                    settings = {"part": part, "precision": precision}
                    rows.append(common.row(f"{part}, {precision}, {kind}", taken, settings=settings, over=over))
    return common.finish(common.result("host's time", rows, clock=args.clock), args)


if __name__ == "__main__":
    main()
