"""Blocks of the shared base that wait in host memory: the same numbers, and no more than two of them at once."""

from itertools import pairwise

import pytest
import torch
from model_runs import FAMILIES, config_of
from torch.multiprocessing.reductions import StorageWeakRef

from danceopd.models.backbones import backbone_of
from danceopd.models.blocks import blocks
from danceopd.models.swapping import ALIVE, Swap, swapped_of
from danceopd.support.errors import UserError
from danceopd.training.assembly.build import build_model
from danceopd.training.loop import Trainer

CHECKPOINTING = {"training.gradient_checkpointing": True}
RUN = CHECKPOINTING | {
    "training.batch_size": 4,
    "training.gradient_accumulation_steps": 2,
    "training.warmup_steps": 0,
    "rollout.num_inference_steps": 3,
}
EMBEDDED = {f"{key}.embedded_guidance": 3.5 for key in ("student", "sources.one", "sources.two")}


class Copies:
    """Counts the blocks of which a copy is alive, whoever holds it: a module, or the graph of a backward."""

    def __init__(self, swap: Swap):
        self.most = self.brought = 0
        self._alive: dict[int, list[StorageWeakRef]] = {}
        bring = swap._bring

        def noted(number):
            bring(number)
            self.brought += 1
            copies = [slot.kept[slot.name] for slot in swap._slots[number]]
            parts = [x.qdata if hasattr(x, "qdata") else x for x in copies]
            self._alive.setdefault(number, []).extend(StorageWeakRef(part.untyped_storage()) for part in parts)
            there = [n for n, refs in self._alive.items() if any(not ref.expired() for ref in refs)]
            self.most = max(self.most, len(there))

        swap._bring = noted


def swap_of(trainer: Trainer) -> Swap:
    return trainer.parts.student._shared[0].swap


def compared(root, tmp_path, count: int, **changes) -> tuple[Copies, Trainer]:
    """Two updates with and without blocks that wait, which must be the same bit for bit."""
    trainers = []
    for swapping in ({}, {"training.swap_blocks": count}):
        own = RUN | changes | swapping | {"training.output_dir": str(tmp_path / f"run{len(trainers)}")}
        config = config_of(root, **own)
        torch.manual_seed(0)
        trainers.append(Trainer(config, build_model(config)))
    plain, swapped = trainers
    copies = Copies(swap_of(swapped))
    for _ in range(2):
        assert plain.update() == swapped.update()
    expected, found = plain.engine.tensors()[0], swapped.engine.tensors()[0]
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    return copies, swapped


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "klein")) for f in FAMILIES if f not in ("sd3", "qwen")]
)
def test_a_run_with_waiting_blocks_is_the_same(places, tmp_path, family):
    root = places(family)
    network = backbone_of(root / "model").load_transformer(root / "model")
    count = len(blocks(network))
    if count <= ALIVE:
        pytest.skip(f"this tiny transformer has {count} blocks")
    changes = EMBEDDED if family in ("flux", "kontext", "flux2") else {}
    copies, _ = compared(root, tmp_path, count, **changes)
    assert copies.most == ALIVE


@pytest.mark.parametrize("precision", ["int8", pytest.param("fp8", marks=pytest.mark.slow), "nf4"])
def test_blocks_wait_in_any_precision(places, tmp_path, precision):
    copies, _ = compared(places("klein"), tmp_path, 3, **{"training.base_precision": precision})
    assert copies.most <= ALIVE


def test_a_block_comes_once_a_forward(places, tmp_path):
    root, steps = places("klein"), 3
    config = config_of(root, **RUN, **{"training.swap_blocks": 4, "training.output_dir": str(tmp_path)})
    trainer = Trainer(config, build_model(config))
    copies = Copies(swap_of(trainer))
    trainer.update()
    # A rollout to the deepest state, the sources, and each of two micro-batches forward and again in the backward.
    assert copies.brought <= 4 * (steps + 1 + 2 * 2) + 1  # and the first of the next forward, ahead


def test_waiting_blocks_are_spread():
    assert swapped_of(10, 5, "it") == [1, 3, 5, 7, 9]
    assert swapped_of(4, 4, "it") == [0, 1, 2, 3]
    for there in range(3, 40):
        for count in range(3, there + 1):
            chosen = swapped_of(there, count, "it")
            gaps = {b - a for a, b in pairwise(chosen)}
            assert len(set(chosen)) == count
            assert max(chosen) < there
            assert max(gaps) - min(gaps) <= 1
    for there, count in ((10, 2), (10, 11), (2, 2)):
        with pytest.raises(UserError, match=f"{count} blocks cannot wait"):
            swapped_of(there, count, "it")


def test_what_does_not_go_with_it_is_said(places, tmp_path):
    root = places("klein")
    for changes, words in (
        ({}, "needs training.gradient_checkpointing"),
        (CHECKPOINTING | {"training.cuda_graphs": True}, "not with training.cuda_graphs"),
        (CHECKPOINTING | {"training.compile": True}, "not with training.compile"),
        (CHECKPOINTING | {"training.precision": "bf16", "training.rollout_precision": "fp8"}, "not with .*rollout_"),
        (CHECKPOINTING | {"student.lora": None}, "is for the transformer that adapters share"),
    ):
        with pytest.raises(UserError, match=words):
            config_of(root, **{"training.swap_blocks": 3}, **changes)
    config = config_of(root, **RUN, **{"training.swap_blocks": 9, "training.output_dir": str(tmp_path)})
    with pytest.raises(UserError, match=r"training.swap_blocks: 9 blocks cannot wait.* has 4"):
        build_model(config)
    with pytest.raises(UserError, match="in one process alone"):
        build_model(config, settings={})
