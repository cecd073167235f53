"""Teacher queries: samples per second and memory of M teachers, as copies, as adapters on one base, and in FP8.

    python benchmarks/query_bench.py                                         # a small SD3 of the real class
    python benchmarks/query_bench.py --teachers 4 --batch 32 --json results.json
    python benchmarks/query_bench.py --model sd35-medium --rank 128          # random weights, made on a GPU

A query asks each sample of a mixed batch from its own teacher, without gradient, and takes the squared error of a
student's velocity with its gradient. A variant is "copies", a network for each teacher with its LoRA merged, or
"shared", all LoRAs on one network (SharedBase); either with more of "fp8" (models.fp8) and "fused", the
error in one pass (danceopd_kernels.routed_velocity_mse) and not by plain PyTorch, joined by "+". Ratios are over the
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
from danceopd_kernels import routed_velocity_mse

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common, networks
from danceopd.core.fields import Field, SharedField, routed
from danceopd.models.backbones import sd3
from danceopd.models.fp8 import to_fp8
from danceopd.models.lora_algebra import Lora, merge_into
from danceopd.models.shared_base import SharedBase
from danceopd.support.memory import keep_freed_memory

PLACES, MORE = ("copies", "shared"), ("fp8", "fused")
DEFAULT = ("copies", "copies+fused", "shared", "shared+fused", "copies+fp8+fused", "shared+fp8+fused")


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


def teachers_of(network: networks.Network, loras: list[Lora], words: list[str]) -> Teachers:
    """The teachers of a variant, on networks of their own."""
    if words[0] == "copies":
        modules = [merge_into(copy.deepcopy(network.module), lora) for lora in loras]
    else:
        modules = [copy.deepcopy(network.module)]
    if "fp8" in words:
        modules = [to_fp8(module) for module in modules]
    if words[0] == "copies":
        fields = [network.field(module) for module in modules]
    else:
        shared = SharedBase(modules[0], loras, sd3.velocity)

        def ask(latents, sigma, conditioning):
            return shared(latents, sigma, conditioning, conditioning.adapter)

        fields = [SharedField(shared, ask, m) for m in range(len(loras))]
    held = {t.data_ptr(): t.nbytes for module in modules for t in (*module.parameters(), *module.buffers())}
    return Teachers(fields, sum(held.values()))


def query_of(teachers: Teachers, route, states, sigma, conditioning, velocity, fused: bool) -> Callable:
    """What is timed; returns the mean loss."""

    def run() -> torch.Tensor:
        target = routed(teachers.fields, route, states, sigma, conditioning)
        loss = routed_velocity_mse(velocity, target, reduction="none", backend=None if fused else "torch").mean()
        torch.autograd.grad(loss, velocity)
        return loss.detach()

    return run


def measure(network: networks.Network, count: int, batch: int, args, limit: dict, resolution: int) -> list[dict]:
    """The variants of so many teachers, in turn."""
    where, generator = common.device(), torch.Generator().manual_seed(0)
    loras = [networks.random_lora(network.module, args.rank, seed) for seed in range(count)]
    states, velocity = (torch.randn(batch, *network.shape, generator=generator).to(where) for _ in range(2))
    sigma = (0.05 + 0.9 * torch.rand(batch, generator=generator)).to(where)
    route = (torch.arange(batch) % count)[torch.randperm(batch, generator=generator)].to(where)
    asked = (route, states, sigma, network.conditioning(batch), velocity.requires_grad_())
    runs, held = {}, {}
    for name in args.variants:
        try:
            teachers = teachers_of(network, loras, name.split("+"))
        except torch.OutOfMemoryError:
            print(f"{name} of {count} teachers is left out: there is no room for it beside the others")
            continue
        runs[name], held[name] = query_of(teachers, *asked, "fused" in name), teachers.bytes
    times, first = common.interleaved(runs, args.rounds), next(iter(runs))
    one = slice(0, 1)
    ask = network.field(network.module)
    flops = batch * common.flops(lambda: ask(states[one], sigma[one], asked[3][one]))
    rows = []
    for name, run in runs.items():
        settings = {"teachers": count, "batch": batch, "resolution": resolution}
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
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [model for model in networks.MODELS if model != "world"]  # which has no LoRA targets
    parser.add_argument("--model", choices=models, default="sd3", help="(%(default)s)")
    parser.add_argument("--teachers", type=common.positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=common.positive, default=8, help="samples of a query (%(default)s)")
    parser.add_argument("--resolution", type=common.positive, help="in pixels")
    parser.add_argument("--rank", type=common.positive, default=16, help="of each teacher's LoRA (%(default)s)")
    parser.add_argument("--variants", type=variant, nargs="+", default=list(DEFAULT), help="the first is the base line")
    args = common.arguments(parser).parse_args(argv)
    keep_freed_memory()
    where, resolution = common.device(), args.resolution or networks.RESOLUTIONS[args.model]
    network = networks.load(args.model, resolution, where)
    limit = common.roofline([network.dtype, *(["float8_e4m3fn"] if any("fp8" in v for v in args.variants) else [])])
    rows = [row for count in args.teachers for row in measure(network, count, args.batch, args, limit, resolution)]
    return common.finish(common.result(f"query, {args.model}", rows, roofline=limit), args)


if __name__ == "__main__":
    main()
