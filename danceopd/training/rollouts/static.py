"""Rollouts of static steps: tensors that stay where they are, and on CUDA a graph of each number of samples."""

import sys
from collections import Counter, OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from danceopd.core.conditioning import Conditioning
from danceopd.core.copies import to_device
from danceopd.core.fields import Field
from danceopd.core.rollout import rows_by_index
from danceopd.core.solver import half_ratio
from danceopd.models.packing import TOKENS
from danceopd.training.rollouts.capture import NotCapturable, Pool
from danceopd.training.rollouts.layouts import Layout, _filled, _flat, _in_layout, _lengths, _tokens
from danceopd.training.rollouts.program import Program
from danceopd.training.rows import Rows

PROGRAMS = 32  # layouts and shapes of samples whose buffers and graphs are kept, the least recently used goes first


class StaticField:
    """Rolls a field out in static steps; asked by itself it is `field`.

    A step evaluates the field and moves the latents in place. Noise levels and the mask of active samples are read on
    the device, and what a field would look up there is settled on the host before the first step: samples with and
    without source pictures, guided or not, with prompts of other lengths, go apart, a layout through all its steps. As
    samples leave, a step shrinks to one of `BUCKETS` sizes; rows up to that size are of samples that have left, and are
    counted as padding. On the CPU the same steps run without graphs.

    Args:
        field: The field that is asked where no static steps are.
        ask: The same network as a field, for samples without guidance.
        both: The same with guidance for all of them (always_guided).
        networks: Whose parameters these read.
        capture: Makes graphs of the steps, on CUDA. Where a step cannot be captured, `reason` is printed once, and
            rollouts ask `field`.
        spent: Counts evaluations, which no step passes through `field` for: by `name` those of samples under way, as
            "padding" those of samples that have left.
        name: The key of the evaluations in spent.
        rows: How many rows a step takes at most.
        pool: What its graphs share with others; its own if not given.
    """

    SOLVERS = ("euler", "ab2")  # Heun's second evaluation is none where a trajectory ends: its steps are not alike

    def __init__(
        self,
        field: Field,
        ask: Field,
        both: Field | None = None,
        networks: Sequence[nn.Module] = (),
        capture: bool = False,
        spent: Counter | None = None,
        name: str = "student",
        rows: Rows | None = None,
        pool: Pool | None = None,
    ):
        self.field, self.ask, self.both, self.networks, self.name = field, ask, both, networks, name
        self.rows = rows or Rows(sys.maxsize)
        self.spent = Counter() if spent is None else spent
        self.programs: OrderedDict[str, Program] = OrderedDict()
        self.reason: str | None = None
        self._addresses: tuple = ()
        self._capture, self._pool = capture, pool
        if pool is not None:
            pool.holders.add(self)

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.field(latents, sigma, conditioning)

    def rollout(
        self,
        noise: torch.Tensor,
        conditioning: Conditioning,
        sigmas: torch.Tensor,
        until: torch.Tensor,
        solver: str,
        start: torch.Tensor,
    ) -> torch.Tensor | None:
        """Integrates as danceopd.core.rollout.rollout does; each sample steps from its own start, so that none waits.

        Args:
            noise, conditioning, sigmas, until, solver, start: As in `danceopd.core.rollout.rollout`.

        Returns:
            The states [B, K, ...] in float32; None where a step cannot be static.
        """
        while solver in self.SOLVERS and not self.reason:
            capacity = min(self.rows.rows, len(noise))
            try:
                return self._rolled(noise, conditioning, sigmas.cpu(), until, solver, start, capacity)
            except torch.OutOfMemoryError as error:
                self.programs.clear()
                self.rows.take_less(capacity, error)
            except NotCapturable as error:
                self._give_up(error)
        return None

    def _rolled(self, noise, conditioning, sigmas, until, solver: str, start, capacity: int) -> torch.Tensor:
        """Makes a rollout, of at most `capacity` samples at a time."""
        steps, spent, tokens, lengths = until.amax(1) - start, Counter(), Counter(), _lengths(conditioning)
        self._check_addresses()
        states = noise.float()[:, None].repeat(1, until.shape[1], *(1,) * (noise.dim() - 1))
        for layout, rows in self._layouts(conditioning, lengths):
            rows = rows[steps[rows].argsort(descending=True, stable=True)]
            rows = rows[steps[rows] > 0]
            for own in rows.split(capacity) if len(rows) else ():
                there, guided = to_device(own, noise.device), layout.guided
                part = _in_layout(conditioning[own], layout)
                program = self._program(noise[there], part, guided, capacity, solver)
                spent += self._integrate(program, sigmas, start[own], until[own], states, there, 1 + guided)
                tokens += _tokens(noise, part, layout, steps[own], lengths[own])
        self.spent.update(spent)
        TOKENS.update(tokens)
        return states

    def _integrate(self, program: Program, sigmas, start, until, states, there, cost: int) -> Counter:
        """Makes all steps of a program's samples, the deepest first, and writes the rows `there` of states."""
        device, steps = states.device, until.amax(1) - start
        number = torch.arange(int(steps[0]))[:, None]
        under_way = number < steps
        index = start + number.minimum(steps - 1)  # a sample that has left stays at its last step
        sigma, next_sigma = sigmas[index], sigmas[index + 1]
        half = half_ratio(sigmas[(index - 1).clamp(min=0)], sigma, next_sigma)
        # A trajectory's first step has no velocity before it and is Euler's.
        half = half.where(under_way & (number > 0), 0)
        numbers = to_device(torch.stack([sigma, next_sigma, half], 1), device)
        active = to_device(under_way, device)
        reached = rows_by_index(until - start[:, None], len(number), device)
        now, going, spent = program.numbers[:, : len(steps)], program.active[: len(steps)], Counter()
        for i, n in enumerate(under_way.sum(1).tolist()):
            now.copy_(numbers[i])
            going.copy_(active[i])
            size = program.size(n)
            self._step(program, size)
            spent[self.name] += cost * n
            spent["padding"] += cost * (size - n)
            row, k = reached[i + 1]
            if len(row):
                states[there[row], k] = program.z[row]
        return spent

    def once(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Asks without gradient for samples that are not asked again, as `field` does."""
        return self.fixed(conditioning, self.rows.rows)(latents, sigma, conditioning)

    def fixed(self, conditioning: Conditioning, capacity: int = 0) -> Field:
        """Makes the field of these samples without gradient, whose caller gives no other conditioning.

        Args:
            conditioning: What the samples are conditioned on.
            capacity: Number of samples that buffers have room for; these samples' if more.

        Returns:
            The field.
        """
        lengths = _lengths(conditioning)
        layouts = [
            (layout, lengths[own], to_device(own, conditioning.device), _in_layout(conditioning[own], layout))
            for layout, own in self._layouts(conditioning, lengths)
        ]
        programs: list[Program] = []
        self._check_addresses()

        def velocity(latents, sigma, _):
            if not self.reason and len(latents) <= self.rows.rows:
                try:
                    return static(latents, sigma)
                except torch.OutOfMemoryError:  # the field takes no buffers, and fewer rows at a time
                    self.programs.clear()
                    programs.clear()
                    if self._pool is not None:
                        self._pool.give_up()
                except NotCapturable as error:
                    self._give_up(error)
            return self.field(latents, sigma, conditioning)

        def static(latents, sigma):
            result, spent, tokens = torch.empty_like(latents), Counter(), Counter()
            for i, (layout, length, own, part) in enumerate(layouts):
                guided = layout.guided
                if i == len(programs):
                    room = max(capacity, len(latents))
                    programs.append(self._program(latents[own], part, guided, room, None))
                program, n = programs[i], len(own)
                program.z[:n].copy_(latents[own])
                program.numbers[0, :n].copy_(sigma[own])
                size = program.size(n)
                self._step(program, size)
                result[own] = program.velocity[:n].to(result.dtype)
                spent[self.name] += (1 + guided) * n
                spent["padding"] += (1 + guided) * (size - n)
                tokens += _tokens(latents, part, layout, torch.ones(n, dtype=torch.int64), length)
            self.spent.update(spent)
            TOKENS.update(tokens)
            return result

        return velocity

    def _layouts(self, conditioning: Conditioning, lengths: torch.Tensor) -> list[tuple[Layout, torch.Tensor]]:
        """Lists each layout that there is, with the numbers of its samples on the CPU."""
        n = len(conditioning)
        sourced, guided = conditioning.sourced(), torch.zeros(n, dtype=torch.bool)
        has = conditioning.has_source if sourced is None else torch.full((n,), sourced)
        if self.both is not None:
            guided = conditioning.guidance_scale != 1
        layouts = [
            Layout(*layout) for layout in zip(has.tolist(), guided.tolist(), _filled(lengths).tolist(), strict=True)
        ]
        samples = {
            layout: torch.tensor([i for i, own in enumerate(layouts) if own == layout])
            for layout in sorted(set(layouts))
        }
        return list(samples.items())

    def _program(self, z, conditioning, guided: bool, capacity: int, solver: str | None) -> Program:
        """Finds the program of such samples, or makes it, and fills it with these."""
        leaves, spec = _flat(conditioning)
        shapes = [(value.shape[1:], value.dtype) for value in (z, *leaves)]
        key = f"{solver} {guided} {shapes} {spec}"
        program = self.programs.get(key)
        if program is None or program.capacity < len(z):
            field = self.both if guided else self.ask
            program = self.programs[key] = Program(field, z, conditioning, capacity, solver)
        self.programs.move_to_end(key)
        while len(self.programs) > PROGRAMS:
            self.programs.popitem(last=False)
        program.fill(z, conditioning)
        return program

    def _step(self, program: Program, size: int) -> None:
        """Makes one step, by a graph where steps are captured."""
        if not self._capture:
            program.step(size)
            return
        if self._pool is None:
            self._pool = Pool(program.z.device)
            self._pool.holders.add(self)
        if size not in program.graphs:
            program.capture(size, self._pool)
        program.graphs[size][0].replay()

    def _check_addresses(self) -> None:
        """Drops all graphs where a weight has moved: a graph reads where the weights were as it was captured."""
        if self._capture:
            now = tuple(t.data_ptr() for n in self.networks for t in (*n.parameters(), *n.buffers()))
            if now != self._addresses:
                for program in self.programs.values():
                    program.graphs.clear()
                self._addresses = now

    def forget(self, reason: str) -> None:
        """Drops all programs, and asks `field` from now on.

        Args:
            reason: Why.
        """
        self.reason = reason
        self.programs.clear()

    def _give_up(self, error: NotCapturable) -> None:
        """Notes and says why rollouts ask `field` from now on."""
        self.forget(str(error))
        Pool.say("rollouts run" if self.name == "student" else f"{self.name} are asked", str(error))
