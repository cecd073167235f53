"""The student's forward and backward in buffers that stay where they are, and on CUDA as two graphs.

A micro-batch then costs the host two launches and a few copies, whatever the number of layers.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from danceopd.core.conditioning import Conditioning
from danceopd.core.copies import to_device
from danceopd.core.fields import Field
from danceopd.models.packing import TOKENS
from danceopd.training.rollouts.capture import GraphSafe, NotCapturable, Pool, no_kept_casts
from danceopd.training.rollouts.layouts import Layout, _filled, _flat, _in_layout, _lengths, _tokens

PASSES = 32  # micro-batches of other numbers or shapes of samples, for which there are graphs; more run without


class _Pass:
    """One forward and backward of so many samples of each layout.

    The buffers are the latents, noise levels and conditioning of each layout's samples, their velocities, and the
    gradient of these.

    Args:
        field: The student.
        parameters: What it trains.
        parts: Latents, noise levels and conditioning by layout.
    """

    def __init__(self, field: Field, parameters: Sequence[nn.Parameter], parts: list[tuple]):
        self.field, self.parameters = field, parameters
        self.inputs = [(z.clone(), sigma.clone(), conditioning._map(torch.clone)) for z, sigma, conditioning in parts]
        self._leaves = [[z, sigma, *_flat(conditioning)[0]] for z, sigma, conditioning in self.inputs]
        self.velocities: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.used: list[int] = []  # numbers of the parameters that the samples pass through
        self.graphs: tuple = ()  # of the forward and of the backward, with the tensors that they read
        self._recorded: list[torch.Tensor] = []

    def fill(self, parts: list[tuple]) -> None:
        """Takes samples.

        Args:
            parts: As at first.
        """
        for own, (z, sigma, conditioning) in zip(self._leaves, parts, strict=True):
            torch._foreach_copy_(own, [z, sigma, *_flat(conditioning)[0]])

    def forward(self) -> None:
        """Makes the forward; this is what the first graph captures."""
        with torch.enable_grad(), no_kept_casts():
            self._recorded = [self.field(*inputs) for inputs in self.inputs]
        if not self.velocities:
            self.velocities = [torch.empty_like(v.detach()) for v in self._recorded]
            self.gradients = [torch.zeros_like(v) for v in self.velocities]
        torch._foreach_copy_(self.velocities, [v.detach() for v in self._recorded])

    def backward(self) -> list[torch.Tensor]:
        """Makes the backward of the last forward.

        Returns:
            The gradients of the parameters in `used`.
        """
        recorded, self._recorded = self._recorded, []  # activations go, even where memory runs out
        found = torch.autograd.grad(recorded, self.parameters, self.gradients, allow_unused=True)
        self.used = [i for i, gradient in enumerate(found) if gradient is not None]
        return [gradient for gradient in found if gradient is not None]

    def capture(self, sums: list[torch.Tensor], pool: Pool) -> None:
        """Captures both graphs; the second adds the gradients to the sums.

        Args:
            sums: For each parameter.
            pool: What the run's graphs share.

        Raises:
            NotCapturable: With the reason.
        """
        before, first, second = GraphSafe(), pool.graph(), pool.graph()
        with pool.capturing():
            self.forward()  # fills caches, compiles kernels
            self.backward()
            with before:
                self.forward()
                self.backward()
            with pool.into(first):
                self.forward()
            with pool.into(second):
                gradients = self.backward()
                torch._foreach_add_([sums[i] for i in self.used], gradients)
        self.graphs = first, second, before.before


class _Replay(torch.autograd.Function):
    """Asks a pass for velocities, and gives it their gradient."""

    @staticmethod
    def forward(ctx, _, student: "StaticStudent", own: _Pass):
        ctx.student, ctx.own, ctx.under_way = student, own, student.begin()
        student.ask(own)
        return tuple(velocity.clone() for velocity in own.velocities)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        ctx.student.add(ctx.own, gradients)
        return None, None, None


class _UnderWay:
    """Is there for as long as a backward may come."""


class StaticStudent:
    """Asks the student with gradient, as `field` does, by passes whose buffers stay where they are.

    Samples with and without source pictures are in one pass; prompts that have a mask are filled up to the longest
    one's length, in steps of layouts.TEXT. One forward is under way at a time: what is asked before its backward, and
    where memory runs out, goes to `field`. Gradients are added up in tensors that stay, and are the parameters' own.

    Args:
        field: The student.
        networks: Whose tensors it reads; those of the first are trained.
        pool: What the run's graphs share; None where no graphs are made.
    """

    def __init__(self, field: Field, networks: Sequence[nn.Module], pool: Pool | None = None):
        self.field, self._networks, self.pool = field, networks, pool
        self.parameters = [p for p in networks[0].parameters() if p.requires_grad]
        self.passes: dict[str, _Pass] = {}
        self.reason: str | None = None
        self._sums: list[torch.Tensor] = []
        self._read: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._under_way: weakref.ref | None = None
        self._anchor = torch.ones((), requires_grad=True)  # that which autograd asks a gradient for
        if pool is not None:
            pool.holders.add(self)

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        if self.reason or not torch.is_grad_enabled() or latents.requires_grad or not len(latents) or self._busy():
            return self.field(latents, sigma, conditioning)
        lengths = _lengths(conditioning)
        layouts = self._layouts(conditioning, int(_filled(lengths.max())))
        places = [None if len(layouts) == 1 else to_device(rows, latents.device) for _, rows in layouts]
        parts = []
        for (layout, rows), there in zip(layouts, places, strict=True):
            z, levels, own = (latents, sigma, conditioning) if there is None else (
                latents[there], sigma[there], conditioning[rows]
            )  # fmt: skip
            parts.append((z, levels, _in_layout(own, layout)))
        own = self._pass(parts)
        if own is None:
            return self.field(latents, sigma, conditioning)
        for (layout, rows), part in zip(layouts, parts, strict=True):
            TOKENS.update(_tokens(part[0], part[2], layout, torch.ones_like(rows), lengths[rows]))
        found = _Replay.apply(self._anchor, self, own)
        if len(layouts) == 1:
            return found[0]
        result = torch.empty_like(latents, dtype=found[0].dtype)
        for velocity, there in zip(found, places, strict=True):
            result = result.index_copy(0, there, velocity)
        return result

    def forget(self, reason: str) -> None:
        """Drops all passes, and asks `field` from now on.

        Args:
            reason: Why.
        """
        self.reason = reason
        self.passes.clear()

    # --- what a pass asks back ------------------------------------------------------------------------

    def begin(self) -> _UnderWay:
        """Notes a forward whose backward may come for as long as the object that is returned is there."""
        under_way = _UnderWay()
        self._under_way = weakref.ref(under_way)
        return under_way

    def ask(self, own: _Pass) -> None:
        """Makes a pass's forward."""
        own.graphs[0].replay() if own.graphs else own.forward()

    def add(self, own: _Pass, gradients: Sequence[torch.Tensor]) -> None:
        """Makes a pass's backward, and adds to the parameters' gradients.

        Args:
            own: The pass.
            gradients: Of its velocities.

        Raises:
            RuntimeError: For a second backward of one forward.
        """
        if not self._busy():
            raise RuntimeError("a backward of a forward that is over: a static forward has one backward")
        torch._foreach_copy_(own.gradients, list(gradients))
        if own.graphs:
            self._take_over(own.used)
            own.graphs[1].replay()
        else:
            found = own.backward()
            self._take_over(own.used)
            torch._foreach_add_([self._sums[i] for i in own.used], found)
        self._under_way = None

    # --- passes ---------------------------------------------------------------------------------------

    def _busy(self) -> bool:
        """Tells whether a forward waits for its backward."""
        return self._under_way is not None and self._under_way() is not None

    def _take_over(self, used: list[int]) -> None:
        """Makes the sums the gradients of these parameters, with what is in those by now."""
        new = [i for i in used if self.parameters[i].grad is not self._sums[i]]
        empty = [self._sums[i] for i in new if self.parameters[i].grad is None]
        if empty:
            torch._foreach_zero_(empty)
        for i in new:
            if (gradient := self.parameters[i].grad) is not None:
                self._sums[i].copy_(gradient)
            self.parameters[i].grad = self._sums[i]

    @staticmethod
    def _layouts(conditioning: Conditioning, length: int) -> list[tuple[Layout, torch.Tensor]]:
        """Lists the layouts, samples with source pictures first, as `packing.by_sources` takes them."""
        sourced, has, every = conditioning.sourced(), conditioning.has_source, torch.arange(len(conditioning))
        if sourced is not None:
            return [(Layout(sourced, False, length), every)]
        return [(Layout(kind, False, length), every[has == kind]) for kind in (True, False)]

    def _pass(self, parts: list[tuple]) -> _Pass | None:
        """Finds the pass of such samples, or makes it, and fills it with these; None where there is none."""
        if not self._sums:
            self._sums = [torch.zeros_like(p) for p in self.parameters]
        self._check_addresses()
        kinds = []
        for z, _, conditioning in parts:
            leaves, spec = _flat(conditioning)
            kinds.append((spec, [(value.shape, value.dtype) for value in (z, *leaves)]))
        key = str(kinds)
        if key in self.passes:
            self.passes[key].fill(parts)
            return self.passes[key]
        if len(self.passes) == PASSES:
            return None
        own = _Pass(self.field, self.parameters, parts)
        if self.pool is not None:
            try:
                own.capture(self._sums, self.pool)
            except torch.OutOfMemoryError:
                self.pool.give_up()
                return None
            except NotCapturable as error:
                self.forget(str(error))
                Pool.say("the student's forward and backward run", str(error))
                return None
        self.passes[key] = own
        return own

    def _check_addresses(self) -> None:
        """Drops all passes where a weight has moved: a graph reads where the weights were as it was captured."""
        if self.pool is None:
            return
        if not self.passes:
            self._read = [t for n in self._networks for t in (*n.parameters(), *n.buffers())]
        now = [t.data_ptr() for t in self._read]
        if now != self._addresses:
            self.passes.clear()
            self._addresses = now
