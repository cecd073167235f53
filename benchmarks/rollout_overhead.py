"""Time of a rollout's step outside the network, of this thread alone: the share that it has of a network of 5 ms.

python benchmarks/rollout_overhead.py --samples 4 8
"""

import argparse
import statistics
import time

import torch

from danceopd.conditioning import Conditioning
from danceopd.graphs import StaticField
from danceopd.memory import keep_freed_memory
from danceopd.query import query
from danceopd.rollout import rollout
from danceopd.schedule import sigma_grid

NETWORK = 5e-3  # seconds


class HostAlone(StaticField):
    """What is left on the host where steps are graphs: without the steps themselves."""

    def _step(self, program, size):
        pass


def per_step(make, samples: int, rounds: int = 20) -> float:
    """Median seconds a step outside the network; make(network) is the field."""
    inside, generator, times = 0.0, torch.Generator().manual_seed(0), []

    def network(latents, sigma, conditioning):
        nonlocal inside
        start = time.thread_time()
        velocity = 0.5 * latents
        inside += time.thread_time() - start
        return velocity

    field, noise = make(network), torch.randn(samples, 3, 32, 32, generator=generator)
    conditioning = Conditioning({"prompt_embeds": torch.zeros(samples, 32, 64)}, None, torch.zeros(samples).bool())
    for _ in range(rounds):
        depth, inside, start = query(samples, 16, generator, bias="low_t"), 0.0, time.thread_time()
        rollout(field, noise, conditioning, sigma_grid(16, 3.0), depth)
        times.append((time.thread_time() - start - inside) / int(depth.max()))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 8])
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    kinds = {
        "as they come": lambda network: network,
        "static": lambda network: StaticField(network, network),
        "static, what graphs leave on the host": lambda network: HostAlone(network, network),
    }
    for samples in args.samples:
        for name, make in kinds.items():
            seconds = per_step(make, samples)
            print(f"{samples} samples, {name}: {1e6 * seconds:.0f} us a step, {100 * seconds / NETWORK:.1f} % of 5 ms")


if __name__ == "__main__":
    main()
