"""A student that DeepSpeed shards over ranks (ZeRO 0 to 3), rolled out on a replica gathered once an update."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from danceopd.config.sections import Config
from danceopd.core.conditioning import Conditioning
from danceopd.models.twins import without_values
from danceopd.support.errors import UserError
from danceopd.support.memory import format_bytes, free_bytes
from danceopd.support.optimizers import make_optimizers
from danceopd.support.ranks import Ranks
from danceopd.training.checkpoints import Checkpoint, bounds
from danceopd.training.engine import kept_share
from danceopd.training.rollouts.replica import (
    Destination,
    bytes_beside,
    destinations,
    make_replica,
    multiplied,
    multiplies_in_bf16,
    rollout_precision,
)
from danceopd.training.zero.lockstep import QUERY, ROLLOUT, Inputs, Lockstep

STATES = ("exp_avg", "exp_avg_sq")  # of AdamW

GATHERED = 2**26  # entries of the weights that are gathered at a time


class Zero:
    """Holds the student of all ranks, as training.engine.Local does in one process; all ranks call each method.

    Under ZeRO-3 every forward all-gathers every parameter, so that a rollout of 16 steps would do it 16 times. Here the
    weights are gathered once an update, some at a time, into a plain copy that the rollout asks, and only the query
    with gradient runs on the shards.

    Args:
        student: The network that is trained.
        config: The run's.
        settings: DeepSpeed's.
        ranks: The processes of the run.
        lockstep: The one that sharded sources have; a new one if not given.

    Raises:
        UserError: For an optimizer or a batch that cannot be shared out.
    """

    def __init__(
        self, student: nn.Module, config: Config, settings: dict, ranks: Ranks, lockstep: Lockstep | None = None
    ):
        import deepspeed

        training, zero = config.training, settings.get("zero_optimization", {})
        if training.optimizer != "adamw":
            raise UserError(f"training.optimizer: {training.optimizer} runs in one process; with DeepSpeed use adamw")
        if training.batch_size // ranks.size < training.gradient_accumulation_steps:
            raise UserError(
                f"training.batch_size: {training.batch_size} samples are not one for each of {ranks.size} ranks' "
                f"{training.gradient_accumulation_steps} micro-batches; raise it, or lower "
                "training.gradient_accumulation_steps"
            )
        self.ranks, self.decay, self.updates, self.stage = ranks, training.ema_decay, 0, zero.get("stage", 0)
        self.max_grad_norm = training.max_grad_norm
        bf16 = multiplies_in_bf16(config)
        self.empty = without_values(student)
        self.shapes = {name: p.shape for name, p in self.empty.named_parameters()}
        [optimizer] = make_optimizers(student, "adamw", training.learning_rate, training.weight_decay)
        parts = training.gradient_accumulation_steps
        fixed = {
            "train_micro_batch_size_per_gpu": -(-training.batch_size // (ranks.size * parts)),
            "gradient_accumulation_steps": parts,
            "gradient_clipping": training.max_grad_norm if self.stage else 0.0,  # without ZeRO it tells no norm
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own for host memory must be compiled there first
            "steps_per_print": 2**31,
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_SeveralBatches(student.train()), optimizer=optimizer, config={**settings, **fixed}
        )
        if self.stage in (1, 2):
            self.optimizer.check_grad_overflow = True  # skip what is not finite, as stage 3 does
        self.network = self.engine.module.student
        self.parameters = dict(self.network.named_parameters())
        self.lockstep = lockstep or Lockstep(ranks)
        self.lockstep.add(self._ask, QUERY)
        precision = rollout_precision(config)
        wanted = precision or (self.stage == 3 and self._fits(training.rollout_on, bf16))
        self.replica = make_replica(self.empty, self.engine.device, config) if wanted else None
        if precision and ranks.rank == 0:
            size = format_bytes(bytes_beside(self.replica, self.empty))
            print(f"rollouts run on a replica in {precision}, gathered once an update: {size} a rank")
        if self.stage == 3 and self.replica is None:
            self.lockstep.add(self._ask, ROLLOUT)
        self.resident = self.network if self.replica is None and self.stage < 3 else self.replica
        # With the optimizer's states in host memory the average is there too.
        self.home = torch.device("cpu") if zero.get("offload_optimizer") else self.engine.device
        self.ema = {name: self._slice(name).to(self.home, copy=True) for name in self.parameters}
        self._refresh(self._slice)

    def student(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Asks the student with gradient; every rank asks equally often.

        Args:
            latents: Float tensor [B, ...].
            sigma: Float tensor [B].
            conditioning: What the B samples are conditioned on.

        Returns:
            The velocity [B, ...].
        """
        return self.lockstep.ask(QUERY, latents, sigma, conditioning)

    @torch.no_grad()
    def rolled(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Asks the student without gradient; a rank asks as often as it likes.

        Args:
            latents: Float tensor [B, ...].
            sigma: Float tensor [B].
            conditioning: What the B samples are conditioned on.

        Returns:
            The velocity [B, ...].
        """
        if self.replica is not None:
            return self.replica(latents, sigma, conditioning)
        if self.stage == 3:
            return self.lockstep.ask(ROLLOUT, latents, sigma, conditioning)
        return self._ask([(latents, sigma, conditioning)])[0]

    def _ask(self, asked: Sequence[Inputs]) -> Sequence[torch.Tensor]:
        """Asks DeepSpeed's engine for several batches in one forward."""
        return self.engine(*(value for one in asked for value in one))

    def finish(self) -> None:
        """Goes on once no rank asks without gradient any more in this update."""
        self.lockstep.finish()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one of an update's micro-batches.

        Args:
            loss: A scalar tensor with gradient, the micro-batch's share of the mean over the global batch.
        """
        # DeepSpeed divides by the number of micro-batches and averages over the ranks.
        self.engine.backward(loss * (self.engine.gradient_accumulation_steps() * self.ranks.size))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch

    def step(self, rate: float, seen: torch.Tensor | None = None) -> tuple[float, bool, torch.Tensor | None]:
        """Makes one optimizer step, but on no rank where the gradient is not finite on one.

        Args:
            rate: The learning rate.
            seen: A tensor that is read on the host.

        Returns:
            The norm of the gradient before it is clipped, whether the student was updated, and what was seen, on the
            CPU.
        """
        seen = None if seen is None else seen.cpu()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = None
        if self.stage == 0:  # the gradients are summed already: all ranks see the same
            norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                self.engine.micro_steps += 1
                return norm, False, seen
        self.engine.step()
        self._forget_gradients()
        if getattr(self.optimizer, "overflow", False):
            return math.nan, False, seen
        for name in self.parameters:
            self.ema[name].lerp_(self._slice(name).to(self.home), 1 - kept_share(self.decay, self.updates))
        self.updates += 1
        self._refresh(self._slice)
        return float(self.engine.get_global_grad_norm()) if norm is None else norm, True, seen

    @contextmanager
    def averaged(self) -> Iterator[Callable]:
        """Gives the average as a field: all ranks enter and leave together, any of them may draw with it in between.

        Returns:
            The context of it.
        """
        if self.replica is not None:
            self._refresh(self.ema.get)
        else:
            kept = {name: self._held(p).detach().clone() for name, p in self.parameters.items()}
            self._hold(self.ema if self.stage == 3 else None)
        try:
            yield self.rolled
        finally:
            self.lockstep.finish()
            self.ranks.wait()
            if self.replica is not None:
                self._refresh(self._slice)
            else:
                self._hold(kept)

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Size]]:
        """Collects this rank's slices of weights, average and optimizer's states, by the names of a checkpoint.

        Returns:
            The slices, flat on the CPU, and the shapes of the whole tensors.
        """
        found = {f"student/{name}": self._slice(name) for name in self.parameters}
        found |= {f"ema/{name}": value for name, value in self.ema.items()}
        found |= {f"optimizer/{key}/{name}": self._state(name, key) for key in STATES for name in self.parameters}
        return {name: t.detach().cpu() for name, t in found.items()}, {
            full: self.shapes[name]
            for name in self.parameters
            for full in (f"student/{name}", f"ema/{name}", *(f"optimizer/{key}/{name}" for key in STATES))
        }

    def rest(self) -> dict:
        """Collects the numbers of updates.

        Returns:
            What a checkpoint keeps beside the large tensors.
        """
        done = next((state["step"] for state in self._states() if "step" in state), torch.tensor(0.0))
        # A tensor of its own for each: one process would count it up once for every parameter that shares it.
        states = {name: {"step": done.to("cpu", copy=True)} for name in self.parameters}
        return {"averaged": self.updates, "optimizer": states}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint, of however many ranks and whatever stage.

        Args:
            checkpoint: The checkpoint.
        """
        rest = checkpoint.rest["engine"]
        self._make_states()
        for name in self.parameters:
            self._set(name, None, checkpoint)
            for key in STATES:
                self._set(name, key, checkpoint)
            self.ema[name].copy_(checkpoint.slice(f"ema/{name}", *self._bounds(name)))
        done = next((state["step"] for state in rest["optimizer"].values() if "step" in state), torch.tensor(0.0))
        for state in self._states():
            state["step"] = done.clone()
        self.updates = rest["averaged"]
        self._refresh(self._slice)

    # --- slices ---------------------------------------------------------------------------------------

    def _bounds(self, name: str) -> tuple[int, int]:
        """Finds this rank's slice of a parameter."""
        return bounds(self.shapes[name].numel(), self.ranks.rank, self.ranks.size)

    def _slice(self, name: str) -> torch.Tensor:
        """Takes this rank's slice of a parameter, flat float32."""
        from deepspeed.utils import safe_get_local_fp32_param

        start, stop = self._bounds(name)
        if self.stage == 3:
            return safe_get_local_fp32_param(self.parameters[name]).flatten()[: stop - start]
        return self.parameters[name].detach().flatten()[start:stop]

    def _state(self, name: str, key: str) -> torch.Tensor:
        """Takes this rank's slice of a state of the optimizer, flat."""
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        p, (start, stop) = self.parameters[name], self._bounds(name)
        if self.stage == 3:
            return safe_get_local_optimizer_state(p, key).flatten()[: stop - start]
        if self.stage:
            return safe_get_full_optimizer_state(p, key).flatten()[start:stop]
        state = self.optimizer.state.get(p, {})
        return state[key].flatten()[start:stop] if key in state else torch.zeros(stop - start)

    def _set(self, name: str, key: str | None, checkpoint: Checkpoint) -> None:
        """Takes a parameter, or a state of its optimizer, from a checkpoint."""
        from deepspeed import utils

        p, full = self.parameters[name], f"optimizer/{key}/{name}" if key else f"student/{name}"
        if self.stage == 3:
            value = torch.zeros_like(utils.safe_get_local_fp32_param(p))
            start, stop = self._bounds(name)
            value.flatten()[: stop - start].copy_(checkpoint.slice(full, start, stop))
            if key:
                utils.safe_set_local_optimizer_state(p, value, key)
            else:
                utils.safe_set_local_fp32_param(p, value)
                p.ds_tensor.data.copy_(value.view_as(p.ds_tensor))
            return
        value = checkpoint.tensor(full).to(p)
        if not key:
            p.copy_(value)
        if self.stage:
            utils.safe_set_full_optimizer_state(p, value, key) if key else utils.safe_set_full_fp32_param(p, value)
        elif key:
            self.optimizer.state[p][key] = value

    def _make_states(self) -> None:
        """Makes the optimizer's states before its first step, which else makes them."""
        base = getattr(self.optimizer, "optimizer", self.optimizer)
        kept = {0: "", 3: "fp32_partitioned_groups_flat"}.get(self.stage, "single_partition_of_fp32_groups")
        for p in getattr(self.optimizer, kept) if kept else self.parameters.values():
            if not base.state[p]:
                base.state[p] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(p) for key in STATES}}
        if self.stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _states(self) -> list[dict]:
        """Lists the states of the optimizer that DeepSpeed drives: of flat parts, or in stage 0 of parameters."""
        return list(getattr(self.optimizer, "optimizer", self.optimizer).state.values())

    def _forget_gradients(self) -> None:
        """Clears the gradients: a parameter that the next update passes by would get this one's again."""
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
            for flat in self.optimizer.fp32_partitioned_groups_flat:
                if flat.grad is not None:
                    flat.grad.zero_()

    # --- what is drawn with ---------------------------------------------------------------------------

    def _fits(self, wanted: str, bf16: bool) -> bool:
        """Tells whether rollouts run on a replica: as wanted, or where it takes no more than half of what is free."""
        narrow = multiplied(self.empty) if bf16 else set()
        needed = sum(shape.numel() * (2 if name in narrow else 4) for name, shape in self.shapes.items())
        free = -self.ranks.most(-free_bytes(self.engine.device))
        chosen = wanted == "replica" or (wanted == "auto" and needed <= free / 2)
        if self.ranks.rank == 0:
            how = (
                f"on a replica, gathered once an update: {format_bytes(needed)} a rank"
                if chosen
                else f"on the shards: each of their forwards gathers the student, {format_bytes(needed)} for a replica"
            )
            print(f"rollouts run {how}, {format_bytes(free)} are free, training.rollout_on is {wanted}")
        return chosen

    def _held(self, p: nn.Parameter) -> torch.Tensor:
        """Returns what this rank holds of a parameter: a shard, or before stage 3 all of it."""
        return p.ds_tensor if self.stage == 3 else p

    @torch.no_grad()
    def _hold(self, values: dict[str, torch.Tensor] | None) -> None:
        """Writes values over what each rank holds of the student, flat and without padding; None: the average."""
        if values is None:
            self._fill(destinations(self.network), self.ema.get)
            return
        for name, p in self.parameters.items():
            held = self._held(p)
            held.view(-1)[: values[name].numel()].copy_(values[name].flatten())
        if self.stage == 3:
            self.engine.empty_partition_cache()  # what is gathered still, which is the old

    def _refresh(self, part: Callable[[str], torch.Tensor]) -> None:
        """Gathers every rank's part of each parameter into the replica."""
        if self.replica is not None:
            self._fill(destinations(self.replica), part)

    @torch.no_grad()
    def _fill(self, targets: dict[str, Destination], part: Callable[[str], torch.Tensor]) -> None:
        """Gathers every rank's part of each parameter into the destination of its name."""
        for names in _bundles(targets, self.shapes):
            self._gather(names, part, targets)

    def _gather(self, names: list[str], part: Callable[[str], torch.Tensor], targets: dict[str, Destination]) -> None:
        """Gathers some parameters of one dtype by one collective."""
        size = self.ranks.size
        widths = [-(-self.shapes[name].numel() // size) for name in names]
        mine = torch.zeros(sum(widths), dtype=targets[names[0]].dtype, device=self.engine.device)
        for own, name in zip(mine.split(widths), names, strict=True):
            value = part(name)
            own[: len(value)].copy_(value)
        everyone = torch.empty(size, len(mine), dtype=mine.dtype, device=mine.device)
        if size > 1:
            dist.all_gather_into_tensor(everyone.flatten(), mine)
        else:
            everyone[0] = mine
        for columns, name in zip(everyone.split(widths, dim=1), names, strict=True):
            shape = self.shapes[name]
            targets[name].write(columns.flatten()[: shape.numel()].view(shape))


class _SeveralBatches(nn.Module):
    """Asks a student for several batches in one forward: DeepSpeed wants one forward for each backward."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def forward(self, *asked):
        return tuple(self.student(*asked[i : i + 3]) for i in range(0, len(asked), 3))


def _bundles(targets: dict[str, Destination], shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Cuts the names into runs of one dtype with at most GATHERED entries, but at least one name."""
    names: list[str] = []
    for name, destination in targets.items():
        same = not names or targets[names[0]].dtype == destination.dtype
        if names and not (same and sum(shapes[n].numel() for n in [*names, name]) <= GATHERED):
            yield names
            names = []
        names.append(name)
    if names:
        yield names
