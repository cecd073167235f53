"""Faults of the path on a card, put back one by one: the pretend card names the line of each.

docs/rollout.md lists those that it cannot show, and what holds them.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from card_runs import EAGER, plain_kernels, trainer_on, world_config
from danceopd_kernels.fp8 import fp8_quantize_rowwise, run_scaled_mm
from pretend_card import HostWait, pretend_card
from pretend_graphs import Stream

from danceopd.core import conditioning, rollout
from danceopd.core.conditioning import Conditioning, placed
from danceopd.core.questions import matched
from danceopd.models import fp8
from danceopd.models.packing import by_sources
from danceopd.training import engine, loop
from danceopd.training.rollouts.static import StaticField
from danceopd.world.build import build

GUIDED = {
    "t2i": {"source": "one", "task": "t2i", "data": {"world": "t2i", "size": 8}, "student_guidance_scale": 2.0},
    "edit": {"source": "two", "task": "edit", "data": {"world": "edit", "size": 8}},
}


def moved_too(name: str):
    """Makes Conditioning.to move a tensor that the host reads."""
    plain = Conditioning.to

    def everything(self, device):
        moved = plain(self, device)
        return replace(moved, **{name: getattr(moved, name).pin_memory().to(device, non_blocking=True)})

    return everything


def read_loss(student, questions):
    found = matched(student, questions)
    assert found.loss.sum().item() >= 0
    return found


def counted_on_the_card(self, network, plain=engine.Average.update):
    device = next(network.parameters()).device
    torch.tensor(self.updates).to(device)
    plain(self, network)


FAULTS = {
    "marks that the host reads": (
        (Conditioning, "to", moved_too("has_source")),
        r"_local_scalar_dense.* at danceopd/core/conditioning\.py:\d+: return bool\(self\.has_source",
    ),
    "guidance scales that the host reads": (
        (Conditioning, "to", moved_too("guidance_scale")),
        r"to the host at danceopd/core/fields\.py:\d+: alpha = torch\.as_tensor\(",
    ),
    "copies that block": (
        (rollout, "to_device", lambda tensor, device: tensor.to(device)),
        r"to the card that blocks",
    ),
    "copies from memory that is not pinned": (
        (rollout, "to_device", lambda tensor, device: tensor.to(device, non_blocking=True)),
        r"to the card from memory that is not pinned",
    ),
    "a hidden item": (
        (loop, "matched", read_loss),
        r"_local_scalar_dense.* at tests/pretend_card/test_faults\.py:\d+: assert found\.loss\.sum\(\)\.item\(\)",
    ),
    "an average that counts in a tensor": (
        (engine.Average, "update", counted_on_the_card),
        r"to the card that blocks at tests/pretend_card/test_faults\.py:\d+: torch\.tensor\(self\.updates\)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wait_more_is_named(networks, tmp_path, monkeypatch, name):
    (*place, fault), line = FAULTS[name]
    with plain_kernels(), pretend_card() as card:
        trainer = trainer_on("card:0", world_config(networks, tmp_path, capabilities=GUIDED, **EAGER), build)
        card.waits.clear()
        trainer.update()
        assert len(card.waits) == 1
        card.waits.clear()
        monkeypatch.setattr(*place, fault)
        trainer.draw()
        trainer._drawn.clear()
        trainer.update()
        assert len(card.waits) > 1
        matching = pytest.raises(HostWait, match=line)
        with matching:
            raise HostWait("\n".join(map(str, card.waits)))


def test_prompts_whose_masks_lie_on_the_card_are_waited_for(monkeypatch):
    """Lengths decide how many forwards there are."""

    def ask(latents, sigma, conditioning, sources, rows):
        return latents

    prompt = {"prompt_embeds": torch.ones(2, 6, 4), "prompt_mask": torch.arange(6) < torch.tensor([[2], [6]])}
    with pretend_card() as card:
        z, sigma = torch.zeros(2, 4, 2, 2, device="card"), torch.ones(2, device="card")
        here = placed(prompt, "card")
        with card.no_waits():
            by_sources(ask, z, sigma, Conditioning(here))
        monkeypatch.setattr(conditioning, "READ_ON_HOST", ())
        with pytest.raises(HostWait, match=r"danceopd/models/packing\.py:\d+"), card.no_waits():
            by_sources(ask, z, sigma, Conditioning(placed(prompt, "card")))


def test_graphs_of_weights_that_have_moved_are_captured_again(networks, tmp_path, monkeypatch):
    with plain_kernels(), pretend_card():
        trainer = trainer_on("card:0", world_config(networks, tmp_path), build)
        batch = trainer.draw()
        until = torch.full((len(batch), 1), 2)
        roll = partial(rollout.rollout, trainer.student, batch.noise, batch.conditioning, trainer.sigmas, until)
        before = roll()[0].cpu()
        network = trainer.parts.student
        network.head.weight = torch.nn.Parameter(network.head.weight.detach() * 2)
        doubled = roll()[0].cpu()
        assert not torch.equal(doubled, before)
        monkeypatch.setattr(StaticField, "_check_addresses", lambda self: None)
        network.head.weight = torch.nn.Parameter(network.head.weight.detach() * 2)
        assert torch.equal(roll()[0].cpu(), doubled)  # the fault: of the weights that were there before


def test_a_capture_that_does_not_wait_for_its_stream_is_refused(networks, tmp_path, monkeypatch, capsys):
    with plain_kernels(), pretend_card():
        trainer = trainer_on("card:0", world_config(networks, tmp_path), build)
        batch = trainer.draw()
        monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)
        trainer.ask(batch)
    assert "reads what another stream wrote" in trainer.student.reason
    assert "rollouts run without CUDA graphs" in capsys.readouterr().err


def test_products_of_codes_take_the_cards_quick_sums(monkeypatch):
    asked = {}

    def scaled_mm(codes, weight, x_scale, weight_scale, bias, **options):
        asked.update(options)
        return torch.zeros(len(codes), weight.shape[1], dtype=options["out_dtype"], device=codes.device)

    codes, weight = (torch.zeros(16, 16, dtype=torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones(16, 1)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    for device, options in (("cpu", {}), ("card", {"use_fast_accum": True})):
        asked.clear()
        with pretend_card():
            run_scaled_mm(*(t.to(device) for t in (codes, scale, weight, scale)), None, torch.bfloat16)
        assert asked == {"out_dtype": torch.bfloat16, **options}


def test_a_weight_is_quantised_in_one_pass_of_a_cards_kernel(monkeypatch):
    parts = []

    def quantised(part):
        parts.append(len(part))
        return fp8_quantize_rowwise(part, backend="torch")

    monkeypatch.setattr(fp8, "has_triton", lambda: True)
    monkeypatch.setattr(fp8, "fp8_quantize_rowwise", quantised)
    monkeypatch.setattr(fp8, "PART", 64)
    linear = torch.nn.Linear(16, 12)
    for device, expected in (("cpu", [4, 4, 4]), ("card", [12])):
        parts.clear()
        with pretend_card():
            fp8.Fp8Linear(linear.to(device), modulates=False)
        assert parts == expected
