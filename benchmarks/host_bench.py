"""The host's time of one sample's query and of the student's forward and backward, with next to nothing to compute.

    python benchmarks/host_bench.py                # both, eager and in static passes, in bf16 or float32 and in FP8

The network is SD3.5-medium's in its depth, heads and second attentions, and 96 wide with a few tokens, on the CPU: what
is left is what the host does for each operation. Layers with adapters take the way that they take on a card, by plain
PyTorch operations instead of one kernel. "static" fills the buffers of a pass and replays its graphs; here a graph's
replay does nothing at all, so that what launching it costs a card's host is not in these figures (one launch of each
graph, whatever it holds). Times are of the processor, and so hold on a machine that others use.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common, networks
from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import counted, routed, within
from danceopd.core.forwards import SharedField
from danceopd.core.questions import Questions, matched
from danceopd.models.backbones import sd3
from danceopd.models.fp8 import to_fp8
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.students import LoraStudent
from danceopd.training.rollouts.static import StaticField
from danceopd.training.rollouts.trained import StaticStudent
from danceopd.training.rows import Rows, in_parts

LAYERS, HEADS, DUAL = 24, 24, 13  # SD3.5-medium's
WIDTH, SIDE, TEXT, RANK, SOURCES = 96, 4, 4, 4, 4
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
        from diffusers import SD3Transformer2DModel

        torch.manual_seed(0)
        base = SD3Transformer2DModel(
            sample_size=SIDE, patch_size=2, in_channels=16, out_channels=16, num_layers=LAYERS,
            attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, caption_projection_dim=WIDTH,
            joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=SIDE,
            dual_attention_layers=tuple(range(DUAL)), qk_norm="rms_norm",
        ).eval()  # fmt: skip
        torch.nn.init.normal_(base.proj_out.weight, std=0.1)
        loras = [networks.random_lora(base, RANK, seed) for seed in range(SOURCES)]
        layers = target_layers(base, sd3.LORA_TARGETS, every=False)
        shared = SharedBase(to_fp8(base) if fp8 else base, loras, sd3.velocity, layers)
        self.student = LoraStudent(shared, layers, RANK, RANK, torch.Generator().manual_seed(1))

        def ask(latents, sigma, conditioning):
            return shared(latents, sigma, conditioning, conditioning.adapter)

        self.field, rows, spent = self.student, Rows(ROWS), Counter()
        field = counted(in_parts(ask, rows), spent, "sources")
        if static:
            pool = NoPool()
            self.field = StaticStudent(self.student, [self.student, base], pool)
            field = StaticField(field, ask, capture=True, spent=spent, name="sources", rows=rows, pool=pool).once
        self.sources = [within(SharedField(shared, ask, m), lambda _: field) for m in range(SOURCES)]
        prompt = {"prompt_embeds": torch.randn(ROWS, TEXT, 16), "pooled_prompt_embeds": torch.randn(ROWS, 16)}
        self.conditioning = Conditioning(prompt, None, torch.zeros(ROWS, dtype=torch.bool))
        self.states, self.sigma = torch.randn(ROWS, 16, SIDE, SIDE), torch.linspace(0.9, 0.1, ROWS)
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
