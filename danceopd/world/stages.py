"""Trains a network of a picture world, going on where a killed run stopped."""

import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.optimizers import Muon

SAVE_EVERY = 60.0  # seconds

AVERAGE = 0.999  # of the exponential average of the weights, which is the result


def generator_of(seed: int, step: int) -> torch.Generator:
    """Returns the generator of one update's data and noise."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def rate(step: int, steps: int, decay: float, warm_up: int = 100) -> float:
    """Returns the learning rate's factor: it rises, stays at 1, and falls to 2 % over the last share `decay`."""
    left = (steps - step) / max(1.0, decay * steps)
    return min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * min(1.0, left))


# Long: a third of it says what its arguments are, and its state is one set of variables.
def run_stage(
    folder: Path,
    name: str,
    model: nn.Module,
    loss: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    decay: float,
    matrices: Callable[[str, torch.Tensor], bool],
    products: torch.dtype = torch.float32,
    log_every: int = 250,
) -> nn.Module:
    """Trains a model by its loss, and keeps its state in folder/name.pt.

    Args:
        folder: Holds the state, and folder/name.jsonl the losses.
        name: The stage's.
        model: What is trained; frozen parameters stay as they are.
        loss: Returns the loss of the update with this number, which alone decides its data.
        steps: Number of updates.
        learning_rate: Its largest value.
        decay: The share of updates with a falling rate.
        matrices: Chooses by name the parameters of two or more dimensions that Muon takes; AdamW takes the rest.
        products: The dtype of Muon's.
        log_every: Updates between two lines of the log.

    Returns:
        The exponential average of the model over the updates, in eval mode.

    Raises:
        FloatingPointError: The loss is not finite.
        UserError: The state is of another number of updates or another learning rate.
    """
    average = AveragedModel(model)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    by_muon = [p for key, p in trained.items() if p.ndim >= 2 and matrices(key, p)]
    rest = [p for p in trained.values() if all(p is not q for q in by_muon)]
    optims: list[torch.optim.Optimizer] = [Muon(by_muon, dtype=products)]
    if rest:  # an adapter has matrices alone
        optims.append(torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01))
    path, step, seconds = folder / f"{name}.pt", 0, 0.0
    schedule = {"steps": steps, "learning_rate": learning_rate, "decay": decay}
    if path.exists():
        state = torch.load(path, weights_only=True)
        _check_schedule(path, state, schedule)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
    log = folder / f"{name}.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]  # what was killed wrote further than it saved
    if kept != lines:
        write_atomic(log, "".join(f"{line}\n" for line in kept).encode())

    def save() -> None:
        buffer = io.BytesIO()
        state = {"model": model.state_dict(), "average": average.state_dict(), "step": step, "seconds": seconds}
        torch.save({**state, **schedule, "optims": [optim.state_dict() for optim in optims]}, buffer)
        write_atomic(path, buffer.getvalue())

    start, saved, losses = time.monotonic() - seconds, time.monotonic(), []
    while step < steps:
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = learning_rate * rate(step, steps, decay)
            optim.zero_grad()
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
        # A young average follows faster, so that it forgets the initial weights.
        average.multi_avg_fn = get_ema_multi_avg_fn(min(AVERAGE, (step + 1) / (step + 10)))
        average.update_parameters(model)
        losses.append(value.item())
        step, seconds = step + 1, time.monotonic() - start
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of {name} is {losses[-1]} at step {step}")
        if step % log_every == 0 or step == steps:
            line = {"stage": name, "step": step, "loss": sum(losses) / len(losses), "seconds": round(seconds)}
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
            losses = []
        if time.monotonic() - saved > SAVE_EVERY:
            save()
            saved = time.monotonic()
    save()
    return average.module.eval()


def _check_schedule(path: Path, state: dict, schedule: dict) -> None:
    """Refuses a state whose updates had other learning rates than a training in one go would have given them."""
    kept = {key: state.get(key) for key in schedule}  # None in states from before it was kept
    if kept != schedule:
        then, now = (", ".join(f"{key} {value}" for key, value in one.items()) for one in (kept, schedule))
        raise UserError(
            f"{path} is of a training with {then}, which cannot go on with {now}; remove it to train from the start, "
            "or train in another folder"
        )
