"""Rollouts: milliseconds of a batch's and of a step, samples per second, evaluations spent over the least possible.

    python benchmarks/rollout_bench.py                                        # the picture world's network
    python benchmarks/rollout_bench.py --full                                 # larger, compiled and in FP8 too
    python benchmarks/rollout_bench.py --model sd3 --batch 4 16 --guidance 1 4.5 --json results.json
    python benchmarks/rollout_bench.py --model sd35-medium --resolution 1024  # random weights, made on a GPU
    python benchmarks/rollout_bench.py --overhead                             # the loop's own time alone

A variant is one of "full", of which every sample takes all steps, and "depth", where each stops at its deepest index
asked (drawn as query.bias low_t does, K = 1), or either with more of "static" (on CUDA captured
graphs), "compiled", "bf16" and "fp8", joined by "+". All variants of a round integrate the same samples to the same
depths, which are other ones in each round. A step's time is the batch's over the steps of its deepest sample. FLOPs
are those of the network as it is, by the number of evaluations; the share of the roofline is of the matrix product
in the network's dtype, for FP8 in its own.
"""

import argparse
import copy
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common, networks
from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import Field, counted, guided
from danceopd.core.query import query
from danceopd.core.rollout import rollout
from danceopd.core.schedule import sigma_grid
from danceopd.core.sde import sde_rollout
from danceopd.models.fp8 import to_fp8
from danceopd.support.memory import keep_freed_memory
from danceopd.training.rollouts.compiled import compile_blocks
from danceopd.training.rollouts.layouts import always_guided
from danceopd.training.rollouts.static import StaticField

STEPS, SHIFT = 16, 3.0
WORDS = ("full", "depth", "static", "compiled", "bf16", "fp8")
DEFAULT = ("full", "depth", "depth+static")
FULL = (*DEFAULT, "depth+compiled", "depth+static+compiled", "depth+bf16", "depth+fp8")
NETWORK = 5e-3  # seconds of a network that the loop's own time is compared with


def variant(text: str) -> str:
    """An argparse type."""
    words = text.split("+")
    if words[0] not in WORDS[:2] or len(set(words)) != len(words) or not set(words[1:]) <= set(WORDS[2:]):
        raise argparse.ArgumentTypeError(f"{text!r} is not full or depth, joined by + with some of {WORDS[2:]}")
    return text


def field_of(network: networks.Network, words: list[str], guidance: float, spent: Counter) -> Field:
    """The network as rollouts ask it; evaluations of samples under way are counted as "student"."""
    module = network.module
    if set(words) & {"bf16", "fp8", "compiled"}:
        module = copy.deepcopy(module)
    if "bf16" in words:
        module = module.bfloat16()
    if "fp8" in words:
        to_fp8(module)
    if "compiled" in words:
        compile_blocks(module)
    ask, both = network.field(module), None
    field = counted(ask, spent, "student")
    if guidance != 1:
        empty = tree_map(lambda value: value[0], network.conditioning(1).prompt)
        both, field = always_guided(ask, empty), guided(field, empty)
    if "static" not in words:
        return field
    return StaticField(field, ask, both, [module], capture=common.device().type == "cuda", spent=spent)


def measure(network, names: list[str], batch: int, guidance: float, args, limit: dict, settings: dict) -> list[dict]:
    """The variants on one size of batch, in turn."""
    generator, where = torch.Generator().manual_seed(0), common.device()
    noise = torch.randn(batch, *network.shape, generator=generator).to(where)
    conditioning = network.conditioning(batch, guidance if guidance != 1 else None)
    sigmas = sigma_grid(STEPS, SHIFT)
    depths = [query(batch, STEPS, generator, bias="low_t") for _ in range(args.rounds)]
    end, calls, spent = torch.full((batch, 1), STEPS), Counter(), {name: Counter() for name in names}

    def runs(name):
        words = name.split("+")
        field = field_of(network, words, guidance, spent[name])

        def run():
            until = end if words[0] == "full" else depths[calls[name] % args.rounds]
            calls[name] += 1
            rollout(field, noise, conditioning, sigmas, until)

        return run

    variants = {name: runs(name) for name in names}
    # As many rounds of warming up as there are, where a size of the batch that is new is compiled or captured.
    once_more = any("compiled" in name or "static" in name for name in names)
    times = common.interleaved(variants, args.rounds, warmup=args.rounds if once_more else 1, clock=args.clock)
    sigma = sigmas[:1].expand(batch).to(where)
    each = common.flops(lambda: network.field(network.module)(noise, sigma, conditioning)) / batch
    deepest = {"full": STEPS, "depth": statistics.median(int(depth.max()) for depth in depths)}
    rows = []
    for name in names:
        words, middle = name.split("+"), common.quartiles(times[name])[1]
        evaluations = spent[name]["student"] / calls[name]
        dtype = "float8_e4m3fn" if "fp8" in words else "bfloat16" if "bf16" in words else network.dtype
        row = common.row(
            name,
            times[name],
            settings=settings,
            samples=batch,
            over=(names[0], times[names[0]]),
            flops=round(each * evaluations),
            share=common.share_of_roofline(limit, middle, each * evaluations, dtype=dtype),
            peak=common.peak_bytes(variants[name]),
            step_ms=1e3 * middle / deepest[words[0]],
            evaluations_per_sample=evaluations / batch,
        )
        if args.profile:
            common.profiled(variants[name], args.profile, " ".join([name, *map(str, settings.values())]))
        rows.append(common.show(row))
    return rows


# ---------------------------------------------------------------------------------------- evaluations, and the loop


def evaluations(batch: int = 64, repeats: int = 8) -> list[dict]:
    """Evaluations spent, with the padding of static steps, over the least possible, on a field that costs nothing."""
    noise, sigmas = torch.zeros(batch, 1), sigma_grid(STEPS, SHIFT)
    conditioning = Conditioning(torch.zeros(batch, 1), None, torch.zeros(batch, dtype=torch.bool))

    def network(latents, sigma, conditioning):
        return torch.zeros_like(latents)

    def spend(name, k, static):
        generator, spent, least = torch.Generator().manual_seed(0), Counter(), 0
        field = counted(network, spent, "student")
        if static:
            field = StaticField(field, network, spent=spent)
        for _ in range(repeats):
            if k is None:  # every state is learnt from, up to the end
                sde_rollout(field, noise, conditioning, sigmas, 0.7, generator)
                least += batch * STEPS
            else:
                until = query(batch, STEPS, generator, bias="low_t", k=k)
                rollout(field, noise, conditioning, sigmas, until)
                least += int(until.amax(1).sum())
        name = f"{name}, static steps" if static else name
        return {"rollout": name, "spent": spent.total(), "least": least, "over_least": spent.total() / least}

    kinds = {"K = 1, low_t": 1, "K = 4, low_t": 4, "SDE": None}
    return [spend(name, k, static) for name, k in kinds.items() for static in (False, True)]


class HostAlone(StaticField):
    """What is left on the host where steps are graphs: without the steps themselves."""

    def _step(self, program, size):
        pass


def overhead(make: Callable, samples: int, rounds: int) -> list[float]:
    """Seconds a step outside the network, of this thread alone, in each round; make(network) is the field."""
    inside, generator, times = 0.0, torch.Generator().manual_seed(0), []

    def network(latents, sigma, conditioning):
        nonlocal inside
        start = time.thread_time()
        velocity = 0.5 * latents
        inside += time.thread_time() - start
        return velocity

    field, noise = make(network), torch.randn(samples, 3, 32, 32, generator=generator)
    conditioning = Conditioning({"prompt_embeds": torch.zeros(samples, 32, 64)}, None, torch.zeros(samples).bool())
    for _ in range(rounds + 1):
        depth, inside, start = query(samples, STEPS, generator, bias="low_t"), 0.0, time.thread_time()
        rollout(field, noise, conditioning, sigma_grid(STEPS, SHIFT), depth)
        times.append((time.thread_time() - start - inside) / int(depth.max()))
    return times[1:]


def overheads(rounds: int) -> list[dict]:
    kinds = {
        "as they come": lambda network: network,
        "static": lambda network: StaticField(network, network),
        "static, what graphs leave on the host": lambda network: HostAlone(network, network),
    }
    rows = []
    for samples in (4, 8):
        for name, make in kinds.items():
            row = common.row(f"a step's own time, {name}", overhead(make, samples, rounds), settings={"batch": samples})
            rows.append(row | {"percent_of_5_ms": row["milliseconds"][1] / NETWORK / 10})
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=networks.MODELS, default="world", help="(%(default)s)")
    parser.add_argument("--batch", type=common.positive, nargs="+", help="samples: 16, with --full 64")
    parser.add_argument("--resolution", type=common.positive, nargs="+", help="in pixels")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="scales; 1 has one branch")
    parser.add_argument("--variants", type=variant, nargs="+", help=f"the first is the base line; {', '.join(DEFAULT)}")
    parser.add_argument("--full", action="store_true", help=f"{', '.join(FULL[3:])} too, 64 samples and 7 rounds")
    parser.add_argument("--overhead", action="store_true", help="the time outside the network alone")
    args = common.arguments(parser, rounds=None).parse_args(argv)
    args.batch, args.rounds = args.batch or [64 if args.full else 16], args.rounds or (7 if args.full else 3)
    args.variants = args.variants or (FULL if args.full else DEFAULT)
    if args.overhead:
        torch.set_num_threads(1)
    keep_freed_memory()
    if args.overhead:
        return common.finish(common.result("rollout, overhead", overheads(3 * args.rounds)), args)
    rows, dtypes = [], {"fp8": "float8_e4m3fn", "bf16": "bfloat16"}
    resolutions = args.resolution or [networks.RESOLUTIONS[args.model]]
    asked = {dtype for word, dtype in dtypes.items() if any(word in name for name in args.variants)}
    limit = common.roofline(
        sorted(asked | {"bfloat16" if common.device().type == "cuda" else "float32"}), clock=args.clock
    )
    for resolution in resolutions:
        network = networks.load(args.model, resolution, common.device())
        for batch in args.batch:
            for guidance in args.guidance:
                settings = {"batch": batch, "resolution": resolution, "guidance": guidance}
                rows += measure(network, args.variants, batch, guidance, args, limit, settings)
    spent = evaluations()
    result = common.result(
        f"rollout, {args.model}", rows, roofline=limit, steps=STEPS, query="low_t, K = 1", evaluations=spent
    )
    common.finish(result, args)
    print("\nnetwork evaluations of rollouts over the least possible:")
    for kind in spent:
        print(f"  {kind['rollout']:<28}{kind['spent']:>8} of {kind['least']:>8}{kind['over_least']:>9.3f}")
    return result


if __name__ == "__main__":
    main()
