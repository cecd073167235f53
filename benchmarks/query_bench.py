"""Teacher queries: samples per second and memory of M teachers, as copies, as adapters on one base, and in FP8.

    python benchmarks/query_bench.py                                         # a small SD3 of the real class
    python benchmarks/query_bench.py --full                                  # 1 to 8 teachers, and FP8
    python benchmarks/query_bench.py --teachers 4 --batch 32 --guidance 1 4.5 --json results.json
    python benchmarks/query_bench.py --model sd35-medium --rank 128          # random weights, made on a GPU

A query asks each sample of a mixed batch from its own teacher, without gradient, and matches a student's velocity with
the answers: each sample's squared error, its gradient, and the norms that a trainer watches. A variant is "copies", a
network for each teacher with its LoRA merged, or "shared", all LoRAs on one network (SharedBase); either with more of
"fp8" (models.fp8) and "fused", joined by "+". With "fused" the answers go as their forwards gave them into the
trainer's own match (core.objectives.velocity_loss), which routes and guides them in one pass; without, the routed and
guided target is written and compared by plain PyTorch. `--guidance` is the teachers' own scale. Ratios are over the
first variant, with as many teachers, in the same rounds. Networks are random and all variants ask the same samples, so
that their losses must agree, those in FP8 nearly.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common, networks
from danceopd.core.fields import Answers, Field, SharedField, guided, routed
from danceopd.core.objectives import velocity_loss
from danceopd.core.questions import Questions
from danceopd.models.backbones import sd3
from danceopd.models.fp8 import to_fp8
from danceopd.models.lora_algebra import Lora, merge_into
from danceopd.models.shared_base import SharedBase
from danceopd.support.memory import keep_freed_memory

PLACES, MORE = ("copies", "shared"), ("fp8", "fused")
DEFAULT = ("copies", "shared", "shared+fused")
FULL = ("copies", "copies+fused", "shared", "shared+fused", "copies+fp8+fused", "shared+fp8+fused")


def variant(text: str) -> str:
    """An argparse type."""
    place, *more = text.split("+")
    if place not in PLACES or len(set(more)) != len(more) or not set(more) <= set(MORE):
        raise argparse.ArgumentTypeError(f"{text!r} is not copies or shared, joined by + with some of fp8 and fused")
    return text


@dataclass(frozen=True)
class Teachers:
    """As fields, and the bytes of the networks that they ask."""

    fields: list[Field]
    bytes: int


def teachers_of(network: networks.Network, loras: list[Lora], words: list[str], guidance: float) -> Teachers:
    """The teachers of a variant, on networks of their own, each asked with the same guidance."""
    if words[0] == "copies":
        modules = [merge_into(copy.deepcopy(network.module), lora) for lora in loras]
    else:
        modules = [copy.deepcopy(network.module)]
    if "fp8" in words:
        modules = [to_fp8(module) for module in modules]
    empty = tree_map(lambda value: torch.zeros_like(value[0]), network.conditioning(1).prompt)
    if words[0] == "copies":
        fields = [guided(network.field(module), empty, guidance) for module in modules]
    else:
        shared = SharedBase(modules[0], loras, sd3.velocity)

        def ask(latents, sigma, conditioning):
            return shared(latents, sigma, conditioning, conditioning.adapter)

        ask = ask if guidance == 1 else guided(ask, empty)
        fields = [SharedField(shared, ask, m, guidance) for m in range(len(loras))]
    held = {t.data_ptr(): t.nbytes for module in modules for t in (*module.parameters(), *module.buffers())}
    return Teachers(fields, sum(held.values()))


def written(velocity: torch.Tensor, answers: Answers) -> tuple[torch.Tensor, ...]:
    """Each sample's squared error against a target that is written first, and the norms of both: plain PyTorch."""
    target = answers.target()
    wide = velocity.to(target.dtype)
    loss = (wide - target).square().flatten(1).mean(1)
    return loss, wide.detach().flatten(1).norm(dim=1), target.flatten(1).norm(dim=1)


def query_of(teachers: Teachers, route, states, sigma, conditioning, velocity, fused: bool) -> Callable:
    """What is timed; returns the mean loss."""
    sample, weight = torch.arange(len(states)), torch.ones(len(states), device=states.device)

    def run() -> torch.Tensor:
        answers = routed(teachers.fields, route, states, sigma, conditioning)
        if fused:
            questions = Questions(states, sigma, conditioning, route, sample, answers, weight)
            loss = velocity_loss(velocity, questions).loss.mean()
        else:
            loss = written(velocity, answers)[0].mean()
        torch.autograd.grad(loss, velocity)
        return loss.detach()

    return run


def measure(network: networks.Network, count: int, guidance: float, args, limit: dict, resolution: int) -> list[dict]:
    """The variants of so many teachers, in turn."""
    where, generator, batch = common.device(), torch.Generator().manual_seed(0), args.batch
    loras = [networks.random_lora(network.module, args.rank, seed) for seed in range(count)]
    states, velocity = (torch.randn(batch, *network.shape, generator=generator).to(where) for _ in range(2))
    sigma = (0.05 + 0.9 * torch.rand(batch, generator=generator)).to(where)
    route = (torch.arange(batch) % count)[torch.randperm(batch, generator=generator)]  # on the host
    asked = (route, states, sigma, network.conditioning(batch), velocity.requires_grad_())
    runs, held = {}, {}
    for name in args.variants:
        try:
            teachers = teachers_of(network, loras, name.split("+"), guidance)
        except torch.OutOfMemoryError:
            print(f"{name} of {count} teachers is left out: there is no room for it beside the others")
            continue
        runs[name], held[name] = query_of(teachers, *asked, "fused" in name), teachers.bytes
    times, first = common.interleaved(runs, args.rounds, clock=args.clock), next(iter(runs))
    one = slice(0, 1)
    ask = network.field(network.module)
    flops = batch * (1 + (guidance != 1)) * common.flops(lambda: ask(states[one], sigma[one], asked[3][one]))
    rows = []
    for name, run in runs.items():
        settings = {"teachers": count, "batch": batch, "resolution": resolution, "guidance": guidance}
        if "shared" in name:
            settings["rank"] = args.rank
        dtype = "float8_e4m3fn" if "fp8" in name else network.dtype
        row = common.row(
            name,
            times[name],
            settings=settings,
            samples=batch,
            over=(first, times[first]),
            flops=flops,
            share=common.share_of_roofline(limit, common.quartiles(times[name])[1], flops, dtype=dtype),
            peak=common.peak_bytes(run),
            networks_MiB=held[name] / 2**20,
            memory_over_first=held[name] / held[first],
            loss=float(run()),
        )
        if args.profile:
            common.profiled(run, args.profile, f"{name} {count} teachers")
        rows.append(common.show(row))
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [model for model in networks.MODELS if model != "world"]  # which has no LoRA targets
    parser.add_argument("--model", choices=models, default="sd3", help="(%(default)s)")
    parser.add_argument("--teachers", type=common.positive, nargs="+", help="2 and 4; with --full 1, 2, 4 and 8")
    parser.add_argument("--batch", type=common.positive, help="samples of a query (4; with --full 8)")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0], help="the teachers' scales; 1 has one branch"
    )
    parser.add_argument("--resolution", type=common.positive, help="in pixels")
    parser.add_argument("--rank", type=common.positive, default=16, help="of each teacher's LoRA (%(default)s)")
    parser.add_argument("--variants", type=variant, nargs="+", help=f"the first is the base line; {', '.join(DEFAULT)}")
    parser.add_argument("--full", action="store_true", help=f"all of {', '.join(FULL)}, and 5 rounds")
    args = common.arguments(parser, rounds=None).parse_args(argv)
    args.teachers, args.batch = (
        args.teachers or ([1, 2, 4, 8] if args.full else [2, 4]),
        args.batch or 4 + 4 * args.full,
    )
    args.rounds, args.variants = (
        args.rounds or (5 if args.full else 3),
        args.variants or (FULL if args.full else DEFAULT),
    )
    keep_freed_memory()
    where, resolution = common.device(), args.resolution or networks.RESOLUTIONS[args.model]
    network = networks.load(args.model, resolution, where)
    limit = common.roofline(
        [network.dtype, *(["float8_e4m3fn"] if any("fp8" in v for v in args.variants) else [])], clock=args.clock
    )
    rows = []
    for count in args.teachers:
        for guidance in args.guidance:
            rows += measure(network, count, guidance, args, limit, resolution)
    return common.finish(common.result(f"query, {args.model}", rows, roofline=limit), args)


if __name__ == "__main__":
    main()
