"""The same run on the CPU and on the pretend card."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pretend_card import PretendCard, cuda_autocast, pretend_card
from world_runs import two_sources

from danceopd.config.reading import parse_config
from danceopd.config.sections import Config
from danceopd.training.assembly import room
from danceopd.training.loop import Trainer

EAGER = {"training": {"cuda_graphs": False}}
BEGINS = "the beginning of a capture"  # what each graph costs once


def world_config(networks: Path, folder: Path, **sections) -> Config:
    """A run of the embedded network of two capabilities, one of which edits."""
    raw = {
        **two_sources(networks, 8),
        "rollout": {"num_inference_steps": 3},
        "training": {"output_dir": str(folder), "batch_size": 6, "max_steps": 8, "warmup_steps": 0, "ema_decay": 0.5},
        "evaluation": {"num_inference_steps": 2},
    }
    for key, value in sections.items():
        raw[key] = {**raw[key], **value} if key in raw and isinstance(value, dict) else value
    if sections.get("method") == "joint":
        del raw["rollout"]  # it rolls nothing out
    return parse_config(raw)


@contextmanager
def lora_as_on_a_card() -> Iterator[None]:
    """Makes layers with adapters take on the CPU the products that they take on a card, by plain PyTorch."""
    compiling = torch.compiler.is_compiling

    def as_on_a_card():
        asks = Path(sys._getframe(1).f_code.co_filename)
        return asks.parts[-2:] == ("danceopd_kernels", "lora.py") or compiling()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", as_on_a_card)
        yield


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Makes every operation run in plain PyTorch, as on a card that has no other kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANCEOPD_KERNELS", "torch")
        yield


def trainer_on(device: str, config, build, **rest) -> Trainer:
    """A run's trainer on a device that no configuration can name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "find_device", lambda _: torch.device(device))
        torch.manual_seed(config.training.seed)
        return Trainer(config, build(config), **rest)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights, the average and the optimizer's states, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in trainer.engine.tensors()[0].items()}


def told(record: dict) -> dict:
    """What of an update's record does not depend on how rollouts are batched."""
    return {key: record[key] for key in ("loss", "loss_by_capability", "gradient_norm", "learning_rate", "skipped")}


def on_cpu(config, build, updates: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The records and the state of a run on the CPU that computes as on a card: in the same products and batches."""
    if config.training.cuda_graphs == "auto":
        config = config.model_copy(update={"training": config.training.model_copy(update={"cuda_graphs": True})})
    with plain_kernels(), lora_as_on_a_card(), cuda_autocast():
        trainer = trainer_on("cpu", config, build)
        records = [told(trainer.update()) for _ in range(updates)]
        return records, state_of(trainer)


def on_card(config, build, updates: int) -> tuple[list[dict], dict, Counter, PretendCard]:
    """The same on the pretend card, and the waits of the last update by phase and line."""
    with plain_kernels(), pretend_card() as card:
        trainer = trainer_on("card:0", config, build)
        assert {p.device.type for p in trainer.parts.student.parameters()} == {"card"}
        records = [told(trainer.update()) for _ in range(updates - 1)]
        card.waits.clear()
        records.append(told(trainer.update()))
        waits = Counter(str(wait) for wait in card.waits if wait.what != BEGINS)
        return records, state_of(trainer), waits, card


def same(expected: dict, found: dict) -> None:
    """Two states, bit for bit."""
    assert expected.keys() == found.keys()
    different = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:5]}"


def compared(config, build, updates: int = 2, bound: int = 1) -> PretendCard:
    """Holds a run on the card against the CPU's, bit for bit, and its last update's waits against a bound."""
    records, state = on_cpu(config, build, updates)
    there, found, waits, card = on_card(config, build, updates)
    assert there == records
    same(state, found)
    assert sum(waits.values()) <= bound, "\n".join(f"{n} {line}" for line, n in waits.items())
    return card
