"""Four updates of one rank under DeepSpeed, in a process of its own: DeepSpeed takes its device once in a process.

`python zero_run.py cpu|card STAGE FOLDER` writes what came of them to FOLDER/DEVICE.json, FOLDER/DEVICE.pt.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pretend_card
import pytest
import torch
from card_runs import plain_kernels, state_of, told, world_config

from danceopd.training.assembly import room
from danceopd.training.loop import Trainer
from danceopd.training.zero.launch import begin
from danceopd.world.build import build


def use_card():
    """Makes the pretend card the device of DeepSpeed, whose collectives go over gloo."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Card(CPU_Accelerator):
        def __init__(self):
            super().__init__()
            self._name = "card"

        def device_name(self, device_index=None):
            return "card" if device_index is None else f"card:{device_index}"

        def device(self, device_index=None):
            return torch.device("card", 0)

        def current_device(self):
            return 0

        def current_device_name(self):
            return "card:0"

        def pin_memory(self, tensor, align_bytes=1):
            return tensor.pin_memory()

        def is_pinned(self, tensor):
            return tensor.is_pinned()

        def on_accelerator(self, tensor):
            return tensor.device.type == "card"

    set_accelerator(Card())


def stays(self, *args, plain=torch.nn.Module.to, **kwargs):
    """Leaves a network alone that is where it shall be: torch would swap tensors that an optimizer knows."""
    if args and {str(p.device) for p in self.parameters()} == {str(args[0])}:
        return self
    return plain(self, *args, **kwargs)


def main(device: str, stage: str, folder: Path) -> None:
    on_card = device == "card"
    if on_card:
        pretend_card.register()
        use_card()
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    settings = folder / f"stage-{stage}.json"
    settings.write_text(
        json.dumps({"zero_optimization": {"stage": int(stage), "stage3_param_persistence_threshold": 0}})
    )
    ranks, settings = begin(settings, "cpu", 60)
    training = {"output_dir": str(folder / device), "optimizer": "adamw", "cuda_graphs": False, "batch_size": 6}
    config = world_config(folder, folder / device, training={**training, "max_steps": 8, "warmup_steps": 0})
    here = pretend_card.pretend_card() if on_card else nullcontext()
    with plain_kernels(), here as card, pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "find_device", lambda _: torch.device("card:0" if on_card else "cpu"))
        patch.setattr(torch.nn.Module, "to", stays)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))  # what torch's collectives ask
        if card is not None:
            card.follows_data = True
        torch.manual_seed(0)
        trainer = Trainer(config, build(config, ranks, settings), ranks, settings)
        records, waits = [], []
        for _ in range(4):  # stage 3 compares its ranks' orders of parameters until the third
            if card is not None:
                card.waits.clear()
            records.append(told(trainer.update()))
            waits = [str(wait) for wait in card.waits] if card is not None else []
        torch.save(state_of(trainer), folder / f"{device}.pt")
    (folder / f"{device}.json").write_text(json.dumps({"records": records, "waits": waits}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
