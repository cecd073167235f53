"""Velocity fields: what is asked, and what sources answer."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from danceopd_kernels.routed_velocity_mse import MAX_TEACHERS

from danceopd.core.conditioning import Conditioning, Tensors, concatenate
from danceopd.core.expressions import Expression, Term, Text, summed
from danceopd.core.phase import phase


class Field(Protocol):
    """Gives a velocity at every state of one flow-matching state space.

    A field may bring more than its call: ``answer``, what its forwards gave before it is combined (`Answers`);
    ``rollout``, a way of its own through a whole trajectory (`danceopd.core.rollout.rollout`); and ``fixed``, itself
    for samples whose conditioning stays the same.
    """

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, /) -> torch.Tensor:
        """Asks for the velocity v = dz / d sigma = noise - data.

        Args:
            latents: Float tensor [B, ...], states z = (1 - sigma) data + sigma noise.
            sigma: Float tensor [B] in [0, 1]; 1 is noise.
            conditioning: What the B samples are conditioned on.

        Returns:
            Float tensor [B, ...] in the shape of the latents.
        """
        ...


@dataclass
class Answers:
    """Holds what sources answered to Q queries as their forwards gave it: nothing is combined yet, and nothing copied.

    The target of a query is ``u + guidance_scale (c - u)`` with ``c = velocities[network][row]`` and
    ``u = unconds[network][uncond_row]``. A query without guidance has its own row as uncond_row, and scale 1.

    Args:
        velocities: A float tensor [n, ...] for each forward; at most `MAX_TEACHERS` of them.
        network: int64 tensor [Q], the forward that a query was in.
        row: int64 tensor [Q], its row there.
        uncond_row: int64 tensor [Q], the row of its unconditional velocity; None where no query is guided.
        guidance_scale: float32 tensor [Q], float64 with states in it; None where no query is guided.
        unconds: The forward that uncond_row is a row of, beside each of the velocities; None where it is the same.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0]])  # with the prompt and without
        >>> first, second = torch.tensor([0]), torch.tensor([1])
        >>> Answers([rows], torch.tensor([0]), first, second, torch.tensor([3.0])).target()
        tensor([[-1.]])
    """

    velocities: list[torch.Tensor]
    network: torch.Tensor
    row: torch.Tensor
    uncond_row: torch.Tensor | None = None
    guidance_scale: torch.Tensor | None = None
    unconds: list[torch.Tensor] | None = None

    @classmethod
    def of(cls, velocity: torch.Tensor) -> "Answers":
        """Wraps one velocity of each query.

        Args:
            velocity: Float tensor [Q, ...], in the order of the queries.

        Returns:
            Answers without guidance.
        """
        rows = torch.arange(len(velocity), device=velocity.device)
        return cls([velocity], torch.zeros_like(rows), rows)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, queries) -> "Answers":
        """Selects queries by slice or index tensor; the velocities stay as they are."""
        chosen = (None if value is None else value[queries] for value in (self.uncond_row, self.guidance_scale))
        return Answers(self.velocities, self.network[queries], self.row[queries], *chosen, self.unconds)

    def target(self) -> torch.Tensor:
        """Writes the target of each query, u + guidance_scale (c - u).

        Returns:
            Tensor [Q, ...] in float32, in float64 where the velocities are in float64.
        """
        one = self.joined()
        wide = torch.promote_types(one.velocities[0].dtype, torch.float32)
        conditional = one.velocities[0][one.row].to(wide)
        if self.guidance_scale is None:
            return conditional
        unconditional = one.velocities[0][one.uncond_row].to(wide)
        scale = self.guidance_scale.to(wide).view(-1, *(1,) * (conditional.dim() - 1))
        return unconditional + scale * (conditional - unconditional)

    def to(self, dtype: torch.dtype) -> "Answers":
        """Copies the rows of these queries in another dtype.

        Args:
            dtype: The dtype of the velocities.

        Returns:
            The same answers in it; these themselves where they have it.
        """
        if all(velocity.dtype == dtype for velocity in (*self.velocities, *(self.unconds or ()))):
            return self
        one, rows = self.joined(), torch.arange(len(self), device=self.row.device)
        wanted = one.row if one.uncond_row is None else torch.cat([one.row, one.uncond_row])
        uncond_row = None if one.uncond_row is None else rows + len(self)
        copied = one.velocities[0][wanted].to(dtype)
        return Answers([copied], torch.zeros_like(rows), rows, uncond_row, self.guidance_scale)

    def joined(self) -> "Answers":
        """Copies the velocities of several forwards into one tensor, in their widest dtype.

        Returns:
            The same answers of one tensor; these themselves where there is one.
        """
        if len(self.velocities) == 1 and self.unconds is None:
            return self
        unconds = self.velocities if self.unconds is None else self.unconds
        each = list({id(v): v for v in (*self.velocities, *unconds)}.values())
        ends = torch.tensor([0, *(len(v) for v in each)]).cumsum(0).tolist()
        start = {id(v): first for v, first in zip(each, ends, strict=False)}

        def moved(row: torch.Tensor, forwards: list[torch.Tensor]) -> torch.Tensor:
            return row + torch.tensor([start[id(v)] for v in forwards], device=row.device)[self.network]

        uncond_row = None if self.uncond_row is None else moved(self.uncond_row, unconds)
        row = moved(self.row, self.velocities)
        return Answers([torch.cat(each)], torch.zeros_like(row), row, uncond_row, self.guidance_scale)


def answer(field: Field, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> Answers:
    """Asks a field for Q velocities as its forwards give them.

    Args:
        field: The field to ask.
        latents: Float tensor [Q, ...].
        sigma: Float tensor [Q].
        conditioning: What the Q queries are conditioned on.

    Returns:
        The answers, in the order of the queries.
    """
    own = getattr(field, "answer", None)
    return Answers.of(field(latents, sigma, conditioning)) if own is None else own(latents, sigma, conditioning)


@dataclass(frozen=True)
class Guided:
    """Guides a field by classifier-free guidance; `guided` makes one and describes it.

    Args:
        field: The field to guide.
        empty_prompt: As in `guided`, and so are the others.
        guidance_scale: The number alpha, or float tensor [B]; None takes each sample's own.
        combine: A model family's own combination.
        every: Evaluates both branches for all samples.
    """

    field: Field
    empty_prompt: Tensors
    guidance_scale: float | torch.Tensor | None = None
    combine: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    every: bool = False

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        alpha, rows, both = self._branches(latents, sigma, conditioning)
        cond, uncond = both[: len(latents)], both[len(latents) :]
        if self.combine:
            mixed = self.combine(cond[rows], uncond, alpha[rows])
        else:
            mixed = uncond + alpha[rows].view(-1, *(1,) * (cond.dim() - 1)) * (cond[rows] - uncond)
        return mixed if isinstance(rows, slice) else cond.to(mixed.dtype).index_copy(0, rows, mixed)

    def answer(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> Answers:
        """Asks for both branches and leaves them as they are; a family's own combination is written.

        Args:
            latents: Float tensor [Q, ...].
            sigma: Float tensor [Q].
            conditioning: What the Q queries are conditioned on.

        Returns:
            The answers, in the order of the queries.

        Raises:
            ValueError: If there are neither one guidance scale nor Q of them.
        """
        if self.combine:
            return Answers.of(self(latents, sigma, conditioning))
        alpha, rows, both = self._branches(latents, sigma, conditioning)
        row = torch.arange(len(latents), device=latents.device)
        uncond_row = row.clone()
        uncond_row[rows] = torch.arange(len(latents), len(both), device=latents.device)
        return Answers([both], torch.zeros_like(row), row, uncond_row, alpha.float())

    def _branches(self, latents, sigma, conditioning):
        """Asks both branches: (scale [B], guided rows, conditional velocities [B, ...] and then the unconditional)."""
        alpha = conditioning.guidance_scale if self.guidance_scale is None else self.guidance_scale
        alpha = torch.as_tensor(alpha, dtype=latents.dtype, device=latents.device)
        if alpha.numel() not in (1, len(latents)):  # a rollout reorders its batch: there, use None
            raise ValueError(f"{alpha.numel()} guidance scales for a batch of {len(latents)}")
        alpha = alpha.expand(len(latents))
        # At scale 1 the conditional branch is the field.
        rows = slice(None) if self.every else (alpha != 1).nonzero()[:, 0]
        empty = conditioning[rows].without_prompt(self.empty_prompt)
        asked = [(latents, sigma, conditioning), (latents[rows], sigma[rows], empty)]
        if _kept_length(empty) != _kept_length(conditioning):
            return alpha, rows, torch.cat([self.field(*branch) for branch in asked])
        z, s = (torch.cat(values) for values in list(zip(*asked, strict=True))[:2])
        return alpha, rows, self.field(z, s, concatenate([conditioning, empty]))


def guided(
    field: Field,
    empty_prompt: Tensors,
    guidance_scale: float | torch.Tensor | None = None,
    combine: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    every: bool = False,
) -> Field:
    """Guides a field: v_alpha = v + alpha (v_cond - v), v the field's velocity for the empty prompt.

    Both branches are evaluated in one batch, except of prompts that keep another length (`Conditioning.prompt`), the
    unconditional one only for samples whose scale is not 1.

    Args:
        field: The field to guide.
        empty_prompt: One sample's, as `Conditioning.prompt` without the batch, for samples that have none of their own.
        guidance_scale: alpha, a number or a float tensor [B]; None takes each sample's own, of
            ``conditioning.guidance_scale``.
        combine: ``combine(cond, uncond, alpha [B]) -> velocity``, where a model family has another combination.
        every: Evaluates both branches for all samples, whatever their scales, so that nothing is read on the device.

    Returns:
        The guided field; `field` itself at the number 1.

    Raises:
        ValueError: When it is asked, if there are neither one scale nor B of them.

    Example:
        >>> def field(latents, sigma, conditioning):  # its velocity is its prompt
        ...     return conditioning.prompt[:, None].expand_as(latents)
        >>> strong = guided(field, empty_prompt=torch.tensor(1.0), guidance_scale=3.0)
        >>> strong(torch.zeros(2, 1), torch.ones(2), Conditioning(torch.tensor([1.0, 2.0])))
        tensor([[1.],
                [4.]])
    """
    if isinstance(guidance_scale, int | float) and guidance_scale == 1:
        return field
    return Guided(field, empty_prompt, guidance_scale, combine, every)


def _kept_length(conditioning: Conditioning) -> int | None:
    """Returns the length of prompts that are computed at the length that they have; None for others."""
    prompt = conditioning.prompt
    return prompt["prompt_keep"].shape[1] if isinstance(prompt, dict) and "prompt_keep" in prompt else None


@dataclass(frozen=True)
class SharedField:
    """Is one of several sources that one network answers for in one forward, whatever mixture of them a batch asks.

    Called as a field it is this source alone.

    Args:
        network: The same object for all sources that share it.
        ask: The network as a field; it reads ``conditioning.adapter`` and ``conditioning.guidance_scale``.
        adapter: The number of this source's adapter; -1 is the network without one.
        guidance_scale: The scale that this source is asked with.
        embedded_guidance: A guidance-distilled model's input, for all of a network's sources or for none.
    """

    network: object
    ask: Field
    adapter: int
    guidance_scale: float = 1.0
    embedded_guidance: float | None = None

    @property
    def identity(self) -> tuple:
        """Tells it from other sources of this and of other networks."""
        return id(self.network), self.adapter, self.guidance_scale, self.embedded_guidance

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        alone = torch.zeros(len(latents), dtype=torch.int64)
        return self.ask(latents, sigma, ask_for([self], alone, conditioning))


def ask_for(fields: Sequence[SharedField], which: torch.Tensor, conditioning: Conditioning) -> Conditioning:
    """Marks each sample with the source of a shared network that it asks.

    Args:
        fields: The sources of one network.
        which: int64 tensor [B] on the CPU, the place in `fields` of each sample's source.
        conditioning: What the B samples are conditioned on.

    Returns:
        The same samples with their source's adapter, guidance scale and embedded guidance.
    """
    device = conditioning.device

    def each(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)[which].to(device)

    own = replace(
        conditioning,
        adapter=each([field.adapter for field in fields], torch.int64),
        guidance_scale=each([field.guidance_scale for field in fields], torch.float32),
        texts=None,
    )
    if fields[0].embedded_guidance is None:
        return own
    return replace(own, embedded_guidance=each([field.embedded_guidance for field in fields], torch.float32))


@phase("query")
@torch.no_grad()
def routed(
    fields: Sequence[Field],
    route: torch.Tensor,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    conditioning: Conditioning,
    sample: torch.Tensor | None = None,
) -> Answers:
    """Asks each query's own field, without gradient; no field sees another's queries.

    Fields of one network (`SharedField`) are asked in one forward, with all terms of operators that are of it.

    Args:
        fields: The sources.
        route: int64 tensor [Q] on the CPU, the number of each query's field.
        latents: Float tensor [Q, ...].
        sigma: Float tensor [Q].
        conditioning: What the Q queries are conditioned on; where `sample` is given, what the samples that they are
            about are conditioned on.
        sample: int64 tensor [Q] on the CPU, which sample of the conditioning each query is about.

    Returns:
        The answers of all queries, in their order.

    Raises:
        IndexError: For a route outside the fields.

    Example:
        >>> fields = [lambda latents, sigma, conditioning: latents, lambda latents, sigma, conditioning: -latents]
        >>> z, prompts = torch.tensor([[1.0], [2.0], [3.0]]), Conditioning(torch.zeros(3))
        >>> routed(fields, torch.tensor([1, 0, 1]), z, torch.ones(3), prompts).target()
        tensor([[-1.],
                [ 2.],
                [-3.]])
    """
    return _asked(fields, route, latents, sigma, conditioning, sample)


@dataclass(frozen=True, eq=False)
class Operator(Expression):
    """Is a source made of other sources; `danceopd.core.operators` makes them.

    `routed` asks all terms of a batch's sources that are of one network in one forward. Two terms are combined in the
    loss; of more, and of combinations that are not linear, the velocity is written. No gradient reaches a source.
    """

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.answer(latents, sigma, conditioning).target().to(latents.dtype)

    @torch.no_grad()
    def answer(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> Answers:
        """Asks for Q velocities.

        Args:
            latents: Float tensor [Q, ...].
            sigma: Float tensor [Q].
            conditioning: What the Q queries are conditioned on.

        Returns:
            The answers, in the order of the queries.
        """
        return _asked([self], torch.zeros(len(latents), dtype=torch.int64), latents, sigma, conditioning)


def as_operator(field: Field) -> Operator:
    """Makes any field an operator of one term.

    Args:
        field: The field.

    Returns:
        The operator; the field itself where it is one.
    """
    if isinstance(field, Operator):
        return field
    return Operator((Term(field),), lambda sigma: torch.ones(len(sigma), 1, dtype=torch.float64))


@dataclass(eq=False)
class _Asked:
    """Queries that ask one field with one text, and where their rows lie in its network's forward."""

    field: Field
    text: Text | None
    queries: torch.Tensor  # int64 on the CPU
    forward: int = 0
    first: int = 0


def _asked(fields, route, latents, sigma, conditioning, sample=None) -> Answers:
    """Asks each network once for all queries and terms, and points each query at its rows."""
    if route.min() < 0 or route.max() >= len(fields):
        raise IndexError(f"routes must lie in [0, {len(fields) - 1}], got {route.min()} to {route.max()}")
    levels = sigma.double().cpu() if any(isinstance(field, Operator) for field in fields) else None
    plain, terms, networks = {}, {}, {}
    for m, field in enumerate(fields):
        queries = (route == m).nonzero()[:, 0]
        if not len(queries):
            continue
        if isinstance(field, Operator):
            found = field.terms(levels[queries]).items()
            terms[m] = {key: _Asked(term.field, term.text, queries[where]) for key, (term, where) in found}
            asked = terms[m].values()
        else:
            asked = [plain.setdefault(m, _Asked(field, None, queries))]
        for one in asked:
            networks.setdefault(_way(one.field, m if m not in terms else None), []).append(one)
    forwards = []
    for (way, _), asked in networks.items():
        ends = torch.tensor([0, *(len(one.queries) for one in asked)]).cumsum(0).tolist()
        for one, first in zip(asked, ends, strict=False):
            one.forward, one.first = len(forwards), first
        forwards.append(_forward(way, asked, latents, sigma, conditioning, sample))
    pointed = _Pointers(latents, forwards)
    for one in plain.values():
        pointed.at_plain(one)
    for m, own in terms.items():
        pointed.at_operator(fields[m], (route == m).nonzero()[:, 0], levels, own)
    return pointed.answers()


def _way(field: Field, m: int | None) -> tuple[str, int]:
    """Tells how a field is asked and in which forward; m: its number, None for a term of an operator."""
    if isinstance(field, SharedField) and (m is not None or field.guidance_scale == 1):
        return "shared", id(field.network)
    return ("term", id(field)) if m is None else ("field", m)


def _forward(way: str, asked: list[_Asked], latents, sigma, conditioning, sample) -> Answers:
    """Asks one network for the rows of all that ask it, one after another."""
    there = torch.cat([one.queries for one in asked]).to(latents.device)
    about, field = _about(asked, conditioning, sample, latents.device), asked[0].field
    if way == "term":  # one velocity, whatever its field combines
        return Answers.of(field(latents[there], sigma[there], about))
    if way == "shared":
        which = torch.arange(len(asked)).repeat_interleave(torch.tensor([len(one.queries) for one in asked]))
        field, about = field.ask, ask_for([one.field for one in asked], which, about)
    return answer(field, latents[there], sigma[there], about)


def _about(asked: list[_Asked], conditioning: Conditioning, sample, device) -> Conditioning:
    """Selects what the rows of a forward are conditioned on."""
    bare, parts, waiting = replace(conditioning, texts=None), [], []

    def index(some):
        queries = torch.cat([one.queries for one in some])
        return (queries if sample is None else sample[queries]).to(device)

    for one in [*asked, None]:
        if one is not None and one.text is None:
            waiting.append(one)  # selected together
            continue
        if waiting:
            parts.append(bare[index(waiting)])
            waiting = []
        if one is not None:
            parts.append(conditioning.with_text(one.text.name, one.text.encoded, index([one])))
    return parts[0] if len(parts) == 1 else concatenate(parts)


class _Pointers:
    """Points queries at rows of forwards, as Answers hold them."""

    def __init__(self, latents: torch.Tensor, forwards: list[Answers]):
        self.forwards, self.device, queries = forwards, latents.device, len(latents)
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # of velocities, and of those without a prompt
        self.network, self.row = (torch.zeros(queries, dtype=torch.int64, device=self.device) for _ in range(2))
        self.uncond_row = torch.zeros_like(self.row)
        self.scale = torch.ones(queries, dtype=torch.promote_types(latents.dtype, torch.float32), device=self.device)
        self.guided = False

    def _pair(self, velocity: torch.Tensor, uncond: torch.Tensor) -> int:
        """Finds the number of two forwards."""
        for i, (one, other) in enumerate(self.pairs):
            if one is velocity and other is uncond:
                return i
        self.pairs.append((velocity, uncond))
        return len(self.pairs) - 1

    def at_plain(self, one: _Asked) -> None:
        """Points the queries of a field of its own at what it answered."""
        part, there = self.forwards[one.forward], one.queries.to(self.device)
        own = part[one.first : one.first + len(one.queries)]
        unconds = part.velocities if part.unconds is None else part.unconds
        numbers = [self._pair(*pair) for pair in zip(part.velocities, unconds, strict=True)]
        self.network[there] = torch.tensor(numbers, device=self.device)[own.network]
        self.row[there] = own.row
        self.uncond_row[there] = own.row if own.uncond_row is None else own.uncond_row
        if own.guidance_scale is not None:
            self.scale[there], self.guided = own.guidance_scale.to(self.scale), True

    def at_operator(self, operator: Operator, queries: torch.Tensor, levels: torch.Tensor, terms: dict) -> None:
        """Points the queries of an operator at the rows of its terms: two at most, else at what is written of them."""
        rows = {}  # of each term, the row of each of these queries in its forward
        for key, one in terms.items():
            place = torch.full((len(levels),), -1)
            place[one.queries] = torch.arange(one.first, one.first + len(one.queries))
            rows[key] = place[queries]
        weights = operator.weights(levels[queries])
        asked = weights != 0
        mixed = torch.tensor([not isinstance(atom, Term) for atom in operator.atoms])
        simple = ~(asked & mixed).any(1) & (asked.sum(1) <= 2)
        # The first and the last of a query's terms, which are one where there is only one.
        first, last = asked.int().argmax(1), asked.shape[1] - 1 - asked.flip(1).int().argmax(1)
        for a, b in sorted(set(zip(first[simple].tolist(), last[simple].tolist(), strict=True))):
            own = (simple & (first == a) & (last == b)).nonzero()[:, 0]
            there, (one, other) = queries[own].to(self.device), (operator.atoms[i].key for i in (a, b))
            (velocity,), (uncond,) = (self._of(terms[key]).velocities for key in (one, other))
            self.network[there] = self._pair(velocity, uncond)
            self.row[there] = self._of(terms[one]).row[rows[one][own].to(self.device)]
            self.uncond_row[there] = self._of(terms[other]).row[rows[other][own].to(self.device)]
            self.scale[there] = weights[own, a].to(self.scale)
            self.guided |= a != b
        rest = (~simple).nonzero()[:, 0]
        if not len(rest):
            return

        def velocity_of(term: Term, some: torch.Tensor) -> torch.Tensor:
            answers = self._of(terms[term.key])
            found = answers.velocities[0][answers.row[rows[term.key][rest[some]].to(self.device)]]
            return found.to(torch.promote_types(found.dtype, torch.float32))

        written = operator.velocity(levels[queries][rest], velocity_of)
        there = queries[rest].to(self.device)
        self.network[there] = self._pair(written, written)
        self.row[there] = self.uncond_row[there] = torch.arange(len(rest), device=self.device)

    def _of(self, one: _Asked) -> Answers:
        """Returns the forward of a term, as one tensor."""
        self.forwards[one.forward] = self.forwards[one.forward].joined()
        return self.forwards[one.forward]

    def answers(self) -> Answers:
        """Returns the answers of all queries."""
        velocities, unconds = map(list, zip(*self.pairs, strict=True))
        if not self.guided:
            return self._few(Answers(velocities, self.network, self.row))
        same = all(one is other for one, other in self.pairs)
        rest = self.uncond_row, self.scale, None if same else unconds
        return self._few(Answers(velocities, self.network, self.row, *rest))

    @staticmethod
    def _few(answers: Answers) -> Answers:
        return answers if len(answers.velocities) <= MAX_TEACHERS else answers.joined()


def soft(fields: Sequence[Field]) -> Field:
    """Makes the mean of the fields a field: what soft routing asks, whatever the sample's route.

    Networks that several of them share are asked in one forward (`routed`).

    Args:
        fields: M of them.

    Returns:
        The field 1 / M sum_m v_m, without gradient.

    Example:
        >>> fields = [lambda latents, sigma, conditioning: latents, lambda latents, sigma, conditioning: -3 * latents]
        >>> soft(fields)(torch.ones(1, 2), torch.ones(1), Conditioning(torch.zeros(1)))
        tensor([[-1., -1.]])
    """

    even = torch.full((1, len(fields)), 1 / len(fields), dtype=torch.float64)
    return Operator(*summed([as_operator(field) for field in fields], lambda sigma: even.expand(len(sigma), -1)))


def hard(fields: Sequence[Field], route: torch.Tensor) -> Field:
    """Makes the field that asks each sample of one batch, in its order, from its own source.

    Args:
        fields: The sources.
        route: int64 tensor [B] on the CPU, the number of each sample's field.

    Returns:
        The field, without gradient, of batches of these B samples alone.

    Raises:
        IndexError: When it is asked, for a route outside the fields.

    Example:
        >>> fields = [lambda latents, sigma, conditioning: latents, lambda latents, sigma, conditioning: -latents]
        >>> hard(fields, torch.tensor([0, 1]))(torch.ones(2, 1), torch.ones(2), Conditioning(torch.zeros(2)))
        tensor([[ 1.],
                [-1.]])
    """

    def velocity(latents, sigma, conditioning):
        return routed(fields, route, latents, sigma, conditioning).target()

    return velocity


def within(field: Field, wrap: Callable[[Field], Field]) -> Field:
    """Puts `wrap` around the network that a field asks, inside of guidance and of sharing.

    Args:
        field: A network as a field, guided, shared or as it is.
        wrap: Makes another field of the network.

    Returns:
        The field that asks the wrapped network.
    """
    if isinstance(field, Operator):
        return field.within(lambda one: within(one, wrap))
    if isinstance(field, SharedField):
        return replace(field, ask=within(field.ask, wrap))
    if isinstance(field, Guided):
        return replace(field, field=within(field.field, wrap))
    return wrap(field)


def counted(field: Field, counter: Counter, name: str) -> Field:
    """Makes a field count its evaluations: counter[name] grows by one for each sample that its network evaluates.

    Args:
        field: The field to be counted.
        counter: Is counted up.
        name: The key of the field's evaluations.

    Returns:
        The same field, counting.
    """

    def counting(network: Field) -> Field:
        def velocity(latents, sigma, conditioning):
            counter[name] += len(latents)
            return network(latents, sigma, conditioning)

        return velocity

    return within(field, counting)
