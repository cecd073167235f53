"""How many rows a forward without gradient takes at a time."""

import sys

import torch

from danceopd.config.sections import Config
from danceopd.core.fields import Field
from danceopd.models.footprint import forward_bytes
from danceopd.support.memory import format_bytes, free_bytes
from danceopd.training.rollouts.capture import Pool

SHARE = 0.8  # the part of the free memory that forwards without gradient may take


class Rows:
    """Holds how many rows a forward without gradient takes; fewer once memory has run out.

    Args:
        rows: The number to begin with, at least 1.

    Attributes:
        pool: The run's graphs, whose memory is given up first.
    """

    def __init__(self, rows: int):
        self.rows = rows
        self.pool: Pool | None = None

    def take_less(self, asked: int, error: torch.OutOfMemoryError) -> None:
        """Gives up the run's graphs, or where there are none takes half of the rows that did not fit, and says so.

        Args:
            asked: Number of rows that did not fit.
            error: Is raised again where one row did not fit.
        """
        if self.pool is not None and self.pool.give_up():
            return
        if asked == 1:
            raise error
        self.rows = asked // 2
        print(
            f"warning: {asked} rows of a forward without gradient did not fit; going on with {self.rows} at a time "
            f"(training.rollout_batch_size: {self.rows} begins so)",
            file=sys.stderr,
        )


def in_parts(network: Field, rows: Rows) -> Field:
    """Asks a network for no more rows at a time than `rows`, and where memory runs out again as these say then.

    Args:
        network: The network as a field.
        rows: How many rows a forward takes, which becomes less where memory runs out.

    Returns:
        The same field, in parts.
    """

    def velocity(latents, sigma, conditioning):
        asked, done, start, n = (latents, sigma, conditioning), [], 0, len(latents)
        while start < n or not done:
            left = n - start
            stop = n if left <= rows.rows else start + -(-left // -(-left // rows.rows))  # equal parts
            try:
                whole = stop - start == n  # nothing to cut
                done.append(network(*(asked if whole else [value[start:stop] for value in asked])))
                start = stop
            except torch.OutOfMemoryError as error:
                rows.take_less(stop - start, error)
                error = None  # its traceback holds the tensors of the forward
        return done[0] if len(done) == 1 else torch.cat(done)

    return velocity


def rows_that_fit(samples: int, bytes_a_row: int, device: torch.device, reserved: int = 0) -> int:
    """Works out how many rows of a forward without gradient fit the memory that is free now.

    Args:
        samples: No more than these are wanted.
        bytes_a_row: What one row takes, as `forward_bytes` measures it.
        device: Where the forward runs.
        reserved: Bytes that will be taken later, as gradients and an optimizer's states.

    Returns:
        The number of rows, at least 1.
    """
    free = SHARE * (free_bytes(device) - reserved)
    return max(1, min(samples, int(free // max(bytes_a_row, 1))))


def choose_rows(wanted: int | str, samples: int, ask_one, device: torch.device, reserved: int = 0) -> Rows:
    """Chooses the rows of a forward without gradient, and says so where they are fewer than the samples.

    Args:
        wanted: The configuration's training.rollout_batch_size, a number or ``auto``.
        samples: The number of samples in this rank's whole batch.
        ask_one: Asks the network to be rolled out for one row, which ``auto`` measures.
        device: Where the network lies.
        reserved: As in `rows_that_fit`.

    Returns:
        The rows to begin with.
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


def less_memory(config: Config) -> str:
    """Says what a run may set to take less memory in an update.

    Args:
        config: The run's.

    Returns:
        "set these keys and go on, or those in another training.output_dir".
    """
    training, adapters = config.training, bool(config.model and config.student.lora)
    same = {
        "gradient_checkpointing: true": config.model and not training.gradient_checkpointing,
        "swap_blocks: auto": adapters and training.gradient_checkpointing and training.swap_blocks is None,
        "offload_sources: true": any(s.weights for s in config.sources.values()) and not training.offload_sources,
    }
    other = {
        "base_precision: int8 (or nf4)": adapters and training.base_precision is None,
        "optimizer: adamw_8bit": config.model and training.optimizer != "adamw_8bit",
        f"batch_size: {max(1, training.batch_size // 2)}": training.batch_size > 1,
    }
    lines = [
        ([key for key, helps in same.items() if helps and config.model], " and go on"),
        ([key for key, helps in other.items() if helps], " in another training.output_dir"),
    ]
    found = ", or ".join(f"training.{', training.'.join(keys)}{how}" for keys, how in lines if keys)
    return f"set {found}" if found else "take a device with more of it"
