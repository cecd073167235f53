"""Asks the sources of a batch: each network in one forward, whatever mixture of sources and terms asks it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from danceopd_kernels.routed_velocity_mse import MAX_TEACHERS

from danceopd.core.answers import Answers, Field, answer
from danceopd.core.conditioning import Conditioning, concatenate
from danceopd.core.copies import to_device
from danceopd.core.expressions import Expression, Term, Text


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

    def each(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)[which]

    own = replace(
        conditioning,
        adapter=each([field.adapter for field in fields], torch.int64),
        guidance_scale=each([field.guidance_scale for field in fields], torch.float32),
        texts=None,
    )
    if fields[0].embedded_guidance is None:
        return own
    embedded = each([field.embedded_guidance for field in fields], torch.float32)
    return replace(own, embedded_guidance=to_device(embedded, conditioning.device))


@dataclass(eq=False)
class _Asked:
    """Queries that ask one field with one text, and where their rows lie in its network's forward."""

    field: Field
    text: Text | None
    queries: torch.Tensor  # int64 on the CPU
    forward: int = 0
    first: int = 0


def ask_each(
    fields: Sequence[Field],
    route: torch.Tensor,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    conditioning: Conditioning,
    sample: torch.Tensor | None = None,
) -> Answers:
    """Asks each network once for all queries and terms, and points each query at its rows.

    Args:
        fields, route, latents, sigma, conditioning, sample: As in `danceopd.core.fields.routed`.

    Returns:
        The answers of all queries, in their order.

    Raises:
        IndexError: For a route outside the fields.
    """
    if route.min() < 0 or route.max() >= len(fields):
        raise IndexError(f"routes must lie in [0, {len(fields) - 1}], got {route.min()} to {route.max()}")
    # On the host, which decides who is asked at them.
    levels = sigma.cpu().double() if any(isinstance(field, Expression) for field in fields) else torch.empty(0)
    sigma = to_device(sigma, latents.device)
    plain: dict[int, _Asked] = {}
    terms: dict[int, dict[tuple, _Asked]] = {}
    networks: dict[tuple, list[_Asked]] = {}
    for m, field in enumerate(fields):
        queries = (route == m).nonzero()[:, 0]
        if not len(queries):
            continue
        if isinstance(field, Expression):
            found = field.terms(levels[queries]).items()
            terms[m] = {key: _Asked(term.field, term.text, queries[where]) for key, (term, where) in found}
        else:
            plain[m] = _Asked(field, None, queries)
        for one in terms[m].values() if m in terms else [plain[m]]:
            networks.setdefault(_way(one.field, None if m in terms else m), []).append(one)
    forwards: list[Answers] = []
    for (way, _), asked in networks.items():
        ends = torch.tensor([0, *(len(one.queries) for one in asked)]).cumsum(0).tolist()
        for one, first in zip(asked, ends, strict=False):
            one.forward, one.first = len(forwards), first
        forwards.append(_forward(way, asked, latents, sigma, conditioning, sample))
    pointed = _Pointers(latents, forwards)
    for one in plain.values():
        pointed.at_plain(one)
    for m, own in terms.items():
        pointed.at_expression(cast(Expression, fields[m]), (route == m).nonzero()[:, 0], levels, own)
    return pointed.answers()


def _way(field: Field, m: int | None) -> tuple[str, int]:
    """Tells how a field is asked, and in which forward; m: its number, None for a term of an expression."""
    if isinstance(field, SharedField) and (m is not None or field.guidance_scale == 1):
        return "shared", id(field.network)
    return ("term", id(field)) if m is None else ("field", m)


def _forward(way: str, asked: list[_Asked], latents, sigma, conditioning, sample) -> Answers:
    """Asks one network for the rows of all that ask it, one after another."""
    there = to_device(torch.cat([one.queries for one in asked]), latents.device)
    about, field = _about(asked, conditioning, sample), asked[0].field
    if way == "term":  # one velocity, whatever its field combines
        return Answers.of(field(latents[there], sigma[there], about))
    if way == "shared":
        which = torch.arange(len(asked)).repeat_interleave(torch.tensor([len(one.queries) for one in asked]))
        sources = [cast(SharedField, one.field) for one in asked]
        field, about = sources[0].ask, ask_for(sources, which, about)
    return answer(field, latents[there], sigma[there], about)


def _about(asked: list[_Asked], conditioning: Conditioning, sample) -> Conditioning:
    """Selects what the rows of a forward are conditioned on."""
    bare, parts, waiting = replace(conditioning, texts=None), [], []

    def index(some):
        queries = torch.cat([one.queries for one in some])
        return queries if sample is None else sample[queries]

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
        self.forwards, queries = forwards, len(latents)
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # of velocities, and of those without a prompt
        self.network, self.row = (torch.zeros(queries, dtype=torch.int64) for _ in range(2))
        self.uncond_row = torch.zeros_like(self.row)
        self.scale = torch.ones(queries, dtype=torch.promote_types(latents.dtype, torch.float32))
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
        part, there = self.forwards[one.forward], one.queries
        own = part[one.first : one.first + len(one.queries)]
        unconds = part.velocities if part.unconds is None else part.unconds
        numbers = [self._pair(*pair) for pair in zip(part.velocities, unconds, strict=True)]
        self.network[there] = torch.tensor(numbers)[own.network]
        self.row[there] = own.row
        self.uncond_row[there] = own.row if own.uncond_row is None else own.uncond_row
        if own.guidance_scale is not None:
            self.scale[there], self.guided = own.guidance_scale.to(self.scale), True

    def at_expression(self, expression: Expression, queries: torch.Tensor, levels: torch.Tensor, terms: dict) -> None:
        """Points queries at the rows of their terms, two at most; else at what is written of them."""
        rows = {}  # of each term, the row of each of these queries in its forward
        for key, one in terms.items():
            place = torch.full((len(levels),), -1)
            place[one.queries] = torch.arange(one.first, one.first + len(one.queries))
            rows[key] = place[queries]
        weights = expression.weights(levels[queries])
        asked = weights != 0
        mixed = torch.tensor([not isinstance(atom, Term) for atom in expression.atoms])
        simple = ~(asked & mixed).any(1) & (asked.sum(1) <= 2)
        # The first and the last of a query's terms, which are one where there is only one.
        first, last = asked.int().argmax(1), asked.shape[1] - 1 - asked.flip(1).int().argmax(1)
        for a, b in sorted(set(zip(first[simple].tolist(), last[simple].tolist(), strict=True))):
            own = (simple & (first == a) & (last == b)).nonzero()[:, 0]
            there, (one, other) = queries[own], (expression.atoms[i].key for i in (a, b))
            (velocity,), (uncond,) = (self._of(terms[key]).velocities for key in (one, other))
            self.network[there] = self._pair(velocity, uncond)
            self.row[there] = self._of(terms[one]).row[rows[one][own]]
            self.uncond_row[there] = self._of(terms[other]).row[rows[other][own]]
            self.scale[there] = weights[own, a].to(self.scale)
            self.guided |= a != b
        rest = (~simple).nonzero()[:, 0]
        if not len(rest):
            return

        def velocity_of(term: Term, some: torch.Tensor) -> torch.Tensor:
            answers = self._of(terms[term.key])
            wanted = answers.row[rows[term.key][rest[some]]]
            found = answers.velocities[0][to_device(wanted, answers.velocities[0].device)]
            return found.to(torch.promote_types(found.dtype, torch.float32))

        written = expression.velocity(levels[queries][rest], velocity_of)
        there = queries[rest]
        self.network[there] = self._pair(written, written)
        self.row[there] = self.uncond_row[there] = torch.arange(len(rest))

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
