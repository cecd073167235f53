"""What a source made of other sources asks, and how their velocities are put together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from danceopd.core.conditioning import Tensors
from danceopd.core.copies import to_device

TINY = 1e-12  # a weight below it is a sum that cancels: nobody is asked for it

Weights = Callable[[torch.Tensor], torch.Tensor]  # of noise levels float64 [n], on the CPU: float64 [n, parts]


@dataclass(frozen=True, eq=False)
class Text:
    """Names a prompt other than the sample's own.

    Args:
        name: The key of each sample's own encoding in `Conditioning.texts`; "" is its empty prompt.
        encoded: One sample's encoding, as `Conditioning.prompt` without the batch, for samples that have none of their
            own.
    """

    name: str
    encoded: Tensors | None = None


@dataclass(frozen=True, eq=False)
class Term:
    """Is one evaluation that an expression takes.

    Args:
        field: The field that is asked.
        text: What it is asked with; None is the sample's own prompt.
        fixed: Whether the text stays where the expression is asked with another prompt.
    """

    field: Any
    text: Text | None = None
    fixed: bool = False

    @property
    def key(self) -> tuple:
        """Names the evaluation: terms of one key have one velocity."""
        return getattr(self.field, "identity", id(self.field)), None if self.text is None else self.text.name


@dataclass(frozen=True, eq=False)
class Mixed:
    """Is a combination that is not linear.

    Args:
        parts: The expressions whose velocities are combined.
        combine: ``combine(*velocities [n, ...]) -> velocity [n, ...]``.
    """

    parts: tuple["Expression", ...]
    combine: Callable[..., torch.Tensor]

    @property
    def key(self) -> int:
        """Names the combination."""
        return id(self)


@dataclass(frozen=True, eq=False)
class Expression:
    """Is a sum of terms and of combinations that are not linear, with weights that depend on the noise level alone.

    Sums of sums are one sum, each of whose terms is asked once, and only where its weight is not zero.

    Args:
        atoms: What is summed.
        weights: Gives the weight of each atom at each noise level; they sum to 1.
    """

    atoms: tuple[Term | Mixed, ...]
    weights: Weights

    def terms(self, sigma: torch.Tensor) -> dict[tuple, tuple[Term, torch.Tensor]]:
        """Finds what is asked at these noise levels.

        Args:
            sigma: float64 tensor [n] on the CPU.

        Returns:
            The terms by their key, each with a bool tensor [n]: where it is asked.
        """
        found: dict[tuple, tuple[Term, torch.Tensor]] = {}

        def add(term: Term, where: torch.Tensor) -> None:
            _, before = found.get(term.key, (term, torch.zeros_like(where)))
            found[term.key] = term, before | where

        for atom, where in zip(self.atoms, (self.weights(sigma) != 0).T, strict=True):
            if not where.any():
                continue
            if isinstance(atom, Term):
                add(atom, where)
                continue
            for part in atom.parts:
                for term, inner in part.terms(sigma[where]).values():
                    add(term, torch.zeros_like(where).masked_scatter(where, inner))
        return found

    def evaluations(self, sigma: torch.Tensor) -> torch.Tensor:
        """Counts the evaluations of one sample at each noise level.

        Args:
            sigma: Float tensor [n].

        Returns:
            int64 tensor [n] on the CPU.
        """
        levels = sigma.double().cpu()
        return sum((where.long() for _, where in self.terms(levels).values()), torch.zeros_like(levels).long())

    def velocity(self, sigma: torch.Tensor, of: Callable[[Term, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Writes the velocities.

        Args:
            sigma: float64 tensor [n] on the CPU.
            of: ``of(term, rows) -> velocity [len(rows), ...]`` gives a term's velocities for rows int64 of the n.

        Returns:
            Float tensor [n, ...].
        """
        return self._velocity(sigma, torch.arange(len(sigma)), of)

    def _velocity(self, sigma, rows, of):
        weights, parts = self.weights(sigma[rows]), []
        for atom, weight in zip(self.atoms, weights.T, strict=True):
            own = weight.nonzero()[:, 0]
            if not len(own):
                continue
            if isinstance(atom, Term):
                velocity = of(atom, rows[own])
            else:
                velocity = atom.combine(*(part._velocity(sigma, rows[own], of) for part in atom.parts))
            scaled = to_device(weight[own].to(velocity.dtype), velocity.device)
            scaled = scaled.view(-1, *(1,) * (velocity.dim() - 1)) * velocity
            parts.append((to_device(own, velocity.device), scaled))
        total = parts[0][1].new_zeros(len(rows), *parts[0][1].shape[1:])
        for own, scaled in parts:
            total[own] += scaled
        return total

    def every_term(self) -> Iterator[Term]:
        """Goes through all terms, also of combinations."""
        for atom in self.atoms:
            if isinstance(atom, Term):
                yield atom
            else:
                for part in atom.parts:
                    yield from part.every_term()

    def texts(self) -> list[str]:
        """Lists the texts of which samples must have encodings of their own, each once."""
        own = (term.text for term in self.every_term())
        return list(dict.fromkeys(text.name for text in own if text is not None and text.encoded is None))

    def at(self, text: Text, fixed: bool = False) -> Self:
        """Asks the same with another prompt in the place of the sample's own; fixed texts stay.

        Args:
            text: The prompt.
            fixed: Whether it stays where the result is asked with yet another. Such a prompt also takes the place of
                texts that are not fixed; one that is not fixed leaves them, for what a part was given is nearer to it.

        Returns:
            The expression.
        """

        def change(atom):
            if isinstance(atom, Term):
                stays = atom.fixed or (atom.text is not None and not fixed)
                return atom if stays else replace(atom, text=text, fixed=fixed)
            return replace(atom, parts=tuple(part.at(text, fixed) for part in atom.parts))

        return type(self)(*_merged([change(atom) for atom in self.atoms], self.weights))

    def within(self, wrap: Callable[[Any], Any]) -> Self:
        """Puts something around every field that is asked.

        Args:
            wrap: Makes another field of one.

        Returns:
            The expression of these fields.
        """
        wrapped = {}  # once each: a field that several terms ask stays one field

        def once(field):
            if id(field) not in wrapped:
                wrapped[id(field)] = wrap(field)
            return wrapped[id(field)]

        def change(expression: Any) -> Any:
            return replace(expression, atoms=tuple(map(one, expression.atoms)))

        def one(atom):
            if isinstance(atom, Term):
                return replace(atom, field=once(atom.field))
            return replace(atom, parts=tuple(map(change, atom.parts)))

        return change(self)


def summed(parts: Sequence[Expression], weights: Weights) -> tuple[tuple[Term | Mixed, ...], Weights]:
    """Works out sum_i weights_i part_i as one sum.

    Args:
        parts: The expressions.
        weights: Of each at each noise level.

    Returns:
        The atoms and their weights, as `Expression` takes them.
    """
    atoms = [atom for part in parts for atom in part.atoms]

    def each(sigma: torch.Tensor) -> torch.Tensor:
        outer = weights(sigma)
        return torch.cat([outer[:, i : i + 1] * part.weights(sigma) for i, part in enumerate(parts)], dim=1)

    return _merged(atoms, each)


def _merged(atoms: Sequence[Term | Mixed], weights: Weights) -> tuple[tuple[Term | Mixed, ...], Weights]:
    """Adds up the weights of terms that are the same."""
    keys = [(atom.key, getattr(atom, "fixed", False)) for atom in atoms]
    kept = dict(zip(keys, atoms, strict=True))
    order = list(dict.fromkeys(keys))
    place = torch.tensor([order.index(key) for key in keys])

    def each(sigma: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(sigma), len(order), dtype=torch.float64).index_add(1, place, weights(sigma))
        return torch.where(found.abs() < TINY, 0.0, found)

    return tuple(kept[key] for key in order), each
