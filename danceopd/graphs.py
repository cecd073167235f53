"""Rollouts of static steps: tensors that stay where they are, and on CUDA a captured graph of each number of samples.

A step evaluates the field and moves the latents in place. Noise levels and the mask of active samples are read on the
device, and what a field would look up there is settled on the host before the first step: samples with and without
source pictures, guided or not, with prompts of other lengths, go apart, each kind through all of its steps. As samples
leave, a step shrinks to one of `BUCKETS` sizes; rows up to that size are of samples that have left, and are counted as
padding. On the CPU the same steps run without graphs.
"""

import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import NamedTuple
from unittest import mock

import torch
from danceopd_kernels import euler_step_
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from danceopd.conditioning import Conditioning, Tensors, with_length
from danceopd.fields import TOKENS, Field, guided, picture_tokens
from danceopd.fp8 import Fp8Linear

# Sizes of a batch, in equal steps. Under low_t with 16 or 8 indices the padding is none of the evaluations up to 16
# samples, 1.6 % at 32, 2.4 % at 64; eight sizes would be 2.8, 4.3 and 5.1 %, powers of two 11, 12 and 13 %.
BUCKETS = 16
PROGRAMS = 32  # kinds and shapes of samples whose buffers and graphs are kept, the least recently used goes first
# Prompts that have a mask are cut or filled up to the next multiple, so that not each length is another shape; this
# one, since Z-Image's transformer fills them up to it by itself, with tokens of its own.
TEXT = 32


class NotCapturable(Exception):
    """Why a step cannot be a graph."""


# ------------------------------------------------------------------------------------- what a graph can't do


class GraphSafe(TorchDispatchMode):
    """Raises NotCapturable at the first operation that a captured graph could not repeat, before any is captured.

    That is a value read on the host, a shape that depends on values, host data made into a tensor, and a copy between
    devices. `before` holds each tensor that was there before and was read: a graph has its address alone, so whoever
    replays it keeps the tensors, even where the cache that they came from has dropped them.
    """

    def __init__(self):
        super().__init__()
        self.before: dict[int, torch.Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if reason := _refusal(func, args, kwargs, tensors):
            raise NotCapturable(f"{func} {reason}")
        out = func(*args, **kwargs)
        for tensor in tensors:
            if (key := _storage(tensor)) not in self._made:
                self.before.setdefault(key, tensor)
        # An output in the storage of what was there before is a view of it.
        self._made |= {_storage(value) for value in tree_leaves(out) if isinstance(value, torch.Tensor)} - set(
            self.before
        )
        return out


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # a tensor of several
        return id(tensor)


def _refusal(func, args, kwargs, tensors: list[torch.Tensor]) -> str | None:
    name, tags = str(func).split(".")[1] if "." in str(func) else str(func), getattr(func, "tags", ())
    if torch.Tag.data_dependent_output in tags:
        return "reads a value on the host"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            return "selects by a mask, so that a shape depends on values"
    elif torch.Tag.dynamic_output_shape in tags:
        return "has a shape that depends on values"
    if name == "lift_fresh":
        return "makes host data a tensor"
    devices = {tensor.device.type for tensor in tensors}
    if name == "_to_copy" and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    if len(devices) > 1:
        return f"copies between {' and '.join(sorted(devices))}"
    return None


@contextmanager
def constants(made: dict) -> Iterator[None]:
    """Numbers and lists that this thread makes tensors of become the same tensor each time, kept in `made`.

    Models make some at every step; a graph could not repeat the copy to the device. The two functions are replaced,
    since a mode of torch's would have compiled blocks compiled once more.
    """
    thread = threading.get_ident()

    def once(make):
        def tensor(*args, **kwargs):
            leaves = tree_leaves((args, kwargs))
            if threading.get_ident() != thread or any(isinstance(leaf, torch.Tensor) for leaf in leaves):
                return make(*args, **kwargs)
            key = f"{make.__name__} {args} {kwargs}"
            if key not in made:
                made[key] = make(*args, **kwargs)
            return made[key]

        return tensor

    with mock.patch.multiple(torch, tensor=once(torch.tensor), as_tensor=once(torch.as_tensor)):
        yield


# --------------------------------------------------------------------------------------------------- a step


class Program:
    """The static step of one kind and shape of samples, of up to `capacity` of them, and its graphs by their number.

    Buffers: latents z [capacity, ...] float32; numbers [3, capacity] float32, the rows sigma, next sigma and half the
    ratio of the step to the one before (ab2; 0 in a trajectory's first); active [capacity] bool; conditioning;
    previous, the velocity before (ab2). solver None: the field's velocity is left in `velocity`, and z stays.
    """

    def __init__(self, field: Field, z: torch.Tensor, conditioning: Conditioning, capacity: int, solver: str | None):
        def room(value: torch.Tensor) -> torch.Tensor:  # of real samples, such that padding computes nothing strange
            return value[:1].repeat(capacity, *(1,) * (value.dim() - 1))

        self.field, self.capacity, self.solver = field, capacity, solver
        self.z, self.conditioning = room(z.float()), conditioning._map(room)
        self.numbers = torch.ones(3, capacity, device=z.device)
        self.active = torch.zeros(capacity, dtype=torch.bool, device=z.device)
        self.previous = torch.zeros_like(self.z) if solver == "ab2" else None
        self.velocity = torch.zeros_like(self.z) if solver is None else None
        self.sizes = sorted({-(-capacity * i // BUCKETS) for i in range(1, BUCKETS + 1)})
        self._first: dict[int, tuple] = {}  # views of the first n samples
        self.graphs: dict[int, tuple] = {}  # by number of samples; with the tensors that the graph reads

    def fill(self, z: torch.Tensor, conditioning: Conditioning) -> None:
        """Take n samples, at the beginning of their trajectories."""
        n = len(z)
        self.z[:n].copy_(z)
        for own, value in zip(_flat(self.conditioning)[0], _flat(conditioning)[0], strict=True):
            own[:n].copy_(value)
        self.active.zero_()
        if self.previous is not None:
            self.previous.zero_()

    def size(self, n: int) -> int:
        """The number of samples that a step of n takes."""
        return next(size for size in self.sizes if size >= n)

    def step(self, n: int) -> None:
        """What is captured: one step of the first n samples."""
        if n not in self._first:
            conditioning, shape = self.conditioning[:n], (-1, *(1,) * (self.z.dim() - 1))
            rest = [None if t is None else t[:n] for t in (self.active, self.previous, self.velocity)]
            self._first[n] = self.z[:n], conditioning, *self.numbers[:, :n], self.numbers[2, :n].view(shape), *rest
        z, conditioning, sigma, next_sigma, _, half, active, previous, out = self._first[n]
        with _no_kept_casts():
            velocity = self.field(z, sigma, conditioning).float()
        if self.solver is None:
            out.copy_(velocity)
            return
        if self.solver == "ab2":
            extrapolated = velocity + half * (velocity - previous)
            previous.copy_(velocity)
            velocity = extrapolated
        euler_step_(z, velocity.contiguous(), sigma, next_sigma, active=active)

    def capture(self, n: int, made: dict, stream: torch.cuda.Stream, pool) -> None:
        """Make the graph of n samples. Raises NotCapturable with the reason; the buffers stay as they were."""
        kept = [t[:n].clone() for t in (self.z, self.previous) if t is not None]
        before, graph = GraphSafe(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            # The outer context leads back to the stream at hand, even where the end of the capture fails.
            with torch.cuda.stream(stream), constants(made):
                self.step(n)  # fills caches, compiles kernels
                with before:
                    self.step(n)
                # Threads of NCCL and of data loaders may go on meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self.step(n)
        except RuntimeError as error:  # CUDA's, an exhausted memory too
            raise NotCapturable(str(error).strip().splitlines()[0]) from error
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            for tensor, value in zip([t for t in (self.z, self.previous) if t is not None], kept, strict=True):
                tensor[:n].copy_(value)
        self.graphs[n] = (graph, before.before)


@contextmanager
def _no_kept_casts():
    """Of weights that autocast casts: one that outlives a step would be an old one in later steps."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


# ------------------------------------------------------------------------------------------------ a rollout


class Kind(NamedTuple):
    """Of samples that share a step: whether they have source pictures and are guided, tokens of their prompts or 0."""

    sourced: bool
    guided: bool
    length: int


class StaticField:
    """A field whose rollouts are static steps; asked by itself it is `field`.

    ask: the same network as a field, for samples without guidance; both: with guidance for all of them
    (always_guided). networks: whose parameters these read. capture: graphs of the steps, on CUDA.
    spent: counts evaluations, which no step passes through `field` for: by `name` those of samples under way, as
    "padding" those of samples that have left. Where a step cannot be captured, `reason` is printed once, and rollouts
    ask `field`.
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
    ):
        self.field, self.ask, self.both, self.networks, self.name = field, ask, both, networks, name
        self.spent = Counter() if spent is None else spent
        self.programs: OrderedDict[str, Program] = OrderedDict()
        self.reason: str | None = None
        self._constants: dict = {}
        self._addresses: tuple = ()
        self._stream = torch.cuda.Stream() if capture else None
        self._pool = torch.cuda.graph_pool_handle() if capture else None

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
        """The states [B, K, ...] float32 of danceopd.rollout.rollout; None where a step cannot be captured.

        Each sample steps from its own start, so that none waits for another to come along.
        """
        steps, spent, tokens, lengths = until.amax(1) - start, Counter(), Counter(), _lengths(conditioning)
        sigmas = sigmas.to(noise.device)
        states = noise.float()[:, None].repeat(1, until.shape[1], *(1,) * (noise.dim() - 1))
        try:
            for kind, rows in self._kinds(conditioning, lengths):
                rows = rows[steps[rows].argsort(descending=True, stable=True)]
                rows = rows[steps[rows] > 0]
                if len(rows):
                    there, guided = rows.to(noise.device), kind.guided
                    part = _of_kind(conditioning[there], kind)
                    program = self._program(noise[there], part, guided, len(noise), solver)
                    spent += self._integrate(program, sigmas, start[rows], until[rows], states, there, 1 + guided)
                    tokens += _tokens(noise, part, kind, steps[rows], lengths[rows])
        except NotCapturable as error:
            self._give_up(error)
            return None
        self.spent.update(spent)
        TOKENS.update(tokens)
        return states

    def _integrate(self, program: Program, sigmas, start, until, states, there, cost: int) -> Counter:
        """All steps of the samples in a program, the deepest first; their states go into the rows `there` of states."""
        device, steps = sigmas.device, until.amax(1) - start
        number = torch.arange(int(steps[0]))[:, None]
        under_way = number < steps
        index = (start + number.minimum(steps - 1)).to(device)  # a sample that has left stays at its last step
        sigma, next_sigma = sigmas[index], sigmas[index + 1]
        half = (next_sigma - sigma) / (sigma - sigmas[(index - 1).clamp(min=0)]) / 2
        # A trajectory's first step has no velocity before it and is Euler's.
        half = half.where((under_way & (number > 0)).to(device), 0)
        numbers, active = torch.stack([sigma, next_sigma, half], 1), under_way.to(device)
        places = reached(until - start[:, None], len(number), device)
        now, going, spent = program.numbers[:, : len(steps)], program.active[: len(steps)], Counter()
        for i, n in enumerate(under_way.sum(1).tolist()):
            now.copy_(numbers[i])
            going.copy_(active[i])
            size = program.size(n)
            self._step(program, size)
            spent[self.name] += cost * n
            spent["padding"] += cost * (size - n)
            row, k = places[i + 1]
            if len(row):
                states[there[row], k] = program.z[row]
        return spent

    def fixed(self, conditioning: Conditioning) -> Field:
        """The velocity of these samples without gradient: a field that its caller gives no other conditioning."""
        lengths = _lengths(conditioning)
        kinds = [
            (kind, lengths[own], own.to(_device(conditioning))) for kind, own in self._kinds(conditioning, lengths)
        ]
        parts = [_of_kind(conditioning[own], kind) for kind, _, own in kinds]
        programs: list[Program] = []

        def velocity(latents, sigma, _):
            if self.reason:
                return self.field(latents, sigma, conditioning)
            result, spent, tokens = torch.empty_like(latents), Counter(), Counter()
            try:
                for i, (kind, length, own) in enumerate(kinds):
                    guided = kind.guided
                    if i == len(programs):
                        programs.append(self._program(latents[own], parts[i], guided, len(latents), None))
                    program, n = programs[i], len(own)
                    program.z[:n].copy_(latents[own])
                    program.numbers[0, :n].copy_(sigma[own])
                    size = program.size(n)
                    self._step(program, size)
                    result[own] = program.velocity[:n].to(result.dtype)
                    spent[self.name] += (1 + guided) * n
                    spent["padding"] += (1 + guided) * (size - n)
                    tokens += _tokens(latents, parts[i], kind, torch.ones(n, dtype=torch.int64), length)
            except NotCapturable as error:
                self._give_up(error)
                return self.field(latents, sigma, conditioning)
            self.spent.update(spent)
            TOKENS.update(tokens)
            return result

        return velocity

    def _kinds(self, conditioning: Conditioning, lengths: torch.Tensor) -> list[tuple["Kind", torch.Tensor]]:
        """(each kind there is, the numbers of its samples on the CPU)."""
        n = len(conditioning)
        sourced, guided = conditioning.sourced(), torch.zeros(n, dtype=torch.bool)
        has = conditioning.has_source.cpu() if sourced is None else torch.full((n,), sourced)
        if self.both is not None:
            guided = conditioning.guidance_scale.cpu() != 1
        kinds = [Kind(*kind) for kind in zip(has.tolist(), guided.tolist(), _filled(lengths).tolist(), strict=True)]
        places = {kind: torch.tensor([i for i, own in enumerate(kinds) if own == kind]) for kind in sorted(set(kinds))}
        return list(places.items())

    def _program(self, z, conditioning, guided: bool, capacity: int, solver: str | None) -> Program:
        """The program of such samples, filled with these."""
        self._check_addresses()
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
        if self._stream is None:
            program.step(size)
            return
        if size not in program.graphs:
            program.capture(size, self._constants, self._stream, self._pool)
        program.graphs[size][0].replay()

    def _check_addresses(self) -> None:
        """A graph reads where the weights were as it was captured: drop all graphs where one has moved since."""
        if self._stream is not None:
            now = tuple(t.data_ptr() for n in self.networks for t in (*n.parameters(), *n.buffers()))
            if now != self._addresses:
                for program in self.programs.values():
                    program.graphs.clear()
                self._addresses = now

    def _give_up(self, error: NotCapturable) -> None:
        self.reason = str(error)
        self.programs.clear()
        print(f"rollouts run without CUDA graphs: {self.reason}", file=sys.stderr)


def reached(number: torch.Tensor, steps: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where number [n, K] int64 on the CPU is 0, 1, ..., steps: (rows, columns) of each, copied to the device once."""
    flat = number.flatten()
    order = flat.argsort(stable=True).to(device)
    sizes = flat.bincount(minlength=steps + 1).tolist()
    k = number.shape[1]
    return list(zip((order // k).split(sizes), (order % k).split(sizes), strict=True))


def fixed(field: Field, conditioning: Conditioning) -> Field:
    """field, to be asked for these very samples and without gradient: by static steps where it has them."""
    return field.fixed(conditioning) if isinstance(field, StaticField) and not field.reason else field


def _flat(conditioning: Conditioning) -> tuple[list[torch.Tensor], TreeSpec]:
    """Its tensors and their names."""
    values = {field.name: getattr(conditioning, field.name) for field in fields(Conditioning)}
    return tree_flatten({name: value for name, value in values.items() if value is not None})


def _device(conditioning: Conditioning) -> torch.device:
    return tree_leaves(conditioning.prompt)[0].device


def _of_kind(conditioning: Conditioning, kind: Kind) -> Conditioning:
    """The same samples, all of one kind, with nothing that the kind does not read."""
    empty = conditioning.empty_prompt if kind.guided else None
    return replace(
        conditioning,
        prompt=_kept(conditioning.prompt, kind.length),
        source=conditioning.source if kind.sourced else None,
        has_source=None,
        guidance_scale=conditioning.guidance_scale if kind.guided else None,
        empty_prompt=None if empty is None else _kept(empty),
    )


def _lengths(conditioning: Conditioning) -> torch.Tensor:
    """[B] int64 on the CPU: tokens of each prompt that has a mask, else 0. Waits for the device."""
    prompt = conditioning.prompt
    if _has_lengths(prompt):
        return prompt["prompt_mask"].sum(1).cpu()
    return torch.zeros(len(conditioning), dtype=torch.int64)


def _has_lengths(prompt: Tensors) -> bool:
    """Not of prompts in parts, each of which Z-Image's transformer fills up by itself."""
    return isinstance(prompt, dict) and "prompt_mask" in prompt and "prompt_parts" not in prompt


def _filled(length):
    return -(-length // TEXT) * TEXT


def _kept(prompt: Tensors, length: int = 0) -> Tensors:
    """A prompt that has a mask, cut or filled up to `length` (0: to a multiple of TEXT), which it is to keep."""
    if not _has_lengths(prompt):
        return prompt
    filled = with_length(prompt, length or _filled(prompt["prompt_mask"].shape[1]))
    filled["prompt_keep"] = filled.pop("prompt_mask")
    return filled


def _tokens(latents, part: Conditioning, kind: Kind, steps: torch.Tensor, lengths: torch.Tensor) -> Counter:
    """What is computed of samples of a kind in so many steps each, as danceopd.fields.TOKENS; of prompts, not empty."""
    if not kind.length:
        return Counter()
    sources = part.source if isinstance(part.source, tuple) else () if part.source is None else (part.source,)
    computed = int(steps.sum()) * (picture_tokens(latents, sources) + kind.length)
    return Counter(computed=computed, padding=int((steps * (kind.length - lengths)).sum()))


def always_guided(field: Field, empty_prompt: Tensors, combine: Callable | None = None) -> Field:
    """danceopd.fields.guided for a step of samples that are all guided: nothing is read on the device."""
    kept = _kept(tree_map(lambda value: value[None], empty_prompt))
    return guided(field, tree_map(lambda value: value[0], kept), combine=combine, every=True)


# ---------------------------------------------------------------------------------------------- compilation


def compile_blocks(network: nn.Module, backend: str | Callable = "inductor") -> int:
    """torch.compile each repeated block of a transformer in place: the modules in the lists at its top; their number.

    Blocks of one class and layout share what is compiled. A second size of the batch makes the size a symbol, and no
    further one compiles anything but a single sample, which torch always takes apart. Layers with adapters, each of
    which is looked up by its name, run as they are: compiled, each block would be one of its own. So do those in FP8,
    whose kernels torch does not see into.
    """
    import torch._dynamo  # takes its time

    transformer = getattr(network, "transformer", network)
    blocks = [block for part in transformer.children() if isinstance(part, nn.ModuleList) for block in part]
    # Layouts, with and without source pictures, gradient or none: a few times the default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in blocks:
        for module in block.modules():
            if hasattr(module, "route") or isinstance(module, Fp8Linear):
                module.forward = torch.compiler.disable(module.forward)
        block.compile(backend=backend)
    return len(blocks)
