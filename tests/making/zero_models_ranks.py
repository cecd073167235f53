"""One rank of test_zero_models: python zero_models_ranks.py JOBS.json runs each of its configurations, in order."""

import json
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch

from danceopd.api import builder_of, distill
from danceopd.config.reading import parse_config
from danceopd.data import sampler
from danceopd.training.loop import train
from danceopd.training.zero import launch


@contextmanager
def routes(pattern):
    """Batches whose routes are pattern[step modulo its length], one number a sample; as they are drawn for None."""
    drawn, draw, step = sampler.route, sampler.step_generator, [0]

    def generator(seed, number, stream=0):
        step[0] = number if stream == 0 else None
        return draw(seed, number, stream)

    def routed(batch_size, weights, generator):
        found = drawn(batch_size, weights, generator)
        if pattern is None or step[0] is None:
            return found
        own = pattern[step[0] % len(pattern)]
        assert len(own) == batch_size
        return torch.tensor(own)

    sampler.route, sampler.step_generator = routed, generator
    try:
        yield
    finally:
        sampler.route, sampler.step_generator = drawn, draw


def run(job, ranks=None, settings=None):
    torch.manual_seed(0)
    with routes(job.get("routes")):
        if ranks is None:
            return distill(job["config"])
        config = parse_config(job["config"])
        return train(config, builder_of(config), False, ranks, settings)


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text())
    ranks, _ = launch.begin(None, "cpu", 60)
    for job in jobs:
        try:
            run(job, ranks, job["settings"])
        except BaseException:
            print(f"rank {ranks.rank}, {job['name']}:\n{traceback.format_exc()}", flush=True)
            raise


if __name__ == "__main__":
    main()
