"""One rank of test_zero_load: python zero_load_ranks.py TRANSFORMER builds it in shards, and says what that took."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from plan_peak import status

from danceopd.models.backbones import empty_transformer
from danceopd.models.weights import of_folder
from danceopd.training.checkpoints import bounds
from danceopd.training.zero import launch
from danceopd.training.zero.sharding import built


def main(folder):
    ranks, _ = launch.begin(None, "cpu", 60)
    weights = of_folder(folder)
    settings = {"zero_optimization": {"stage": 3}}
    empty_transformer(folder)  # what is imported for it
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark back
    before = status("VmRSS")
    network = built(folder, weights, torch.float32, ranks, settings)
    grown = status("VmHWM") - before
    held = 0
    for name, p in network.named_parameters():
        start, stop = bounds(p.ds_numel, ranks.rank, ranks.size)
        assert p.ds_tensor.flatten()[: stop - start].equal(weights.read(name, start, stop)), name
        held += p.ds_tensor.nbytes
    for name, buffer in network.named_buffers():
        if name in weights.shapes:
            assert buffer.equal(weights.tensor(name)), name
    print(f"held {held} grown {grown}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
