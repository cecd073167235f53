"""How an update asks: the student as a field, and every network in as many rows at a time as fit."""

import sys

import torch

from danceopd.config.sections import Config
from danceopd.core.fields import Field, guided
from danceopd.models.footprint import forward_bytes
from danceopd.support.memory import format_bytes, free_bytes

SHARE = 0.8  # of the memory that is free, which forwards without gradient may take


class Rows:
    """How many rows a forward without gradient takes; fewer once memory has run out.

    Args:
        rows: The number to begin with, at least 1.
    """

    def __init__(self, rows: int):
        self.rows = rows

    def halve(self, asked: int, error: torch.OutOfMemoryError) -> None:
        """Takes half of the rows that did not fit, and says so; raises the error where one row did not."""
        if asked == 1:
            raise error
        self.rows = asked // 2
        print(
            f"warning: {asked} rows of a forward without gradient did not fit; going on with {self.rows} at a time "
            f"(training.rollout_batch_size: {self.rows} begins so)",
            file=sys.stderr,
        )


def in_parts(network: Field, rows: Rows) -> Field:
    """Asks a network for no more rows at a time than `rows`, and for half of them again where memory runs out."""

    def velocity(latents, sigma, conditioning):
        done, start, n = [], 0, len(latents)
        while start < n:
            left = n - start
            stop = start + -(-left // -(-left // rows.rows))  # equal parts
            try:
                done.append(network(latents[start:stop], sigma[start:stop], conditioning[start:stop]))
                start = stop
            except torch.OutOfMemoryError as error:
                rows.halve(stop - start, error)
                error = None  # its traceback holds the tensors of the forward
        return done[0] if len(done) == 1 else torch.cat(done)

    return velocity


def rows_that_fit(samples: int, bytes_a_row: int, device: torch.device, reserved: int = 0) -> int:
    """Works out how many rows of a forward without gradient fit the memory that is free now.

    Args:
        samples: No more than these are wanted.
        bytes_a_row: What one row takes, as `forward_bytes` measures it.
        device: Where.
        reserved: Bytes that will be taken later, as gradients and an optimizer's states.
    """
    free = SHARE * (free_bytes(device) - reserved)
    return max(1, min(samples, int(free // max(bytes_a_row, 1))))


def choose_rows(wanted: int | str, samples: int, ask_one, device: torch.device, reserved: int = 0) -> Rows:
    """Chooses the rows of a forward without gradient.

    Args:
        wanted: training.rollout_batch_size.
        samples: Those of this rank's whole batch.
        ask_one: Asks the network to be rolled out for one row, which `auto` measures.
        device: Of the network.
        reserved: As in `rows_that_fit`.
    """
    if wanted != "auto":
        return Rows(min(wanted, samples))
    if samples == 1:
        return Rows(1)
    one = forward_bytes(ask_one)
    rows = rows_that_fit(samples, one, device, reserved)
    if rows < samples:
        print(f"rollouts and queries take {rows} of {samples} rows at a time: {format_bytes(one)} each")
    return Rows(rows)


def guidance_scales(config: Config) -> list[float] | None:
    """Lists the student's own scale for each capability's samples; None where all are 1."""
    scales = [capability.student_guidance_scale for capability in config.capabilities.values()]
    return None if all(scale == 1 for scale in scales) else scales


def as_student(config: Config, parts, network: Field) -> Field:
    """Makes a network the field that is trained: in the training's precision, guided by each sample's own scale.

    Args:
        config: The run's.
        parts: Its `Parts`, of which the empty prompt and the combination are read.
        network: The student's, or another in its place.
    """
    velocity = in_precision(config, parts.device, network)
    if guidance_scales(config) is None:
        return velocity
    return guided(velocity, parts.empty_prompt, combine=parts.combine)


def in_precision(config: Config, device: torch.device, network: Field) -> Field:
    """Asks a network in the student's precision."""
    bf16 = config.training.precision == "bf16" and not config.model

    def velocity(latents, sigma, conditioning):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return network(latents, sigma, conditioning)

    return velocity
