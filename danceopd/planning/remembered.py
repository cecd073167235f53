"""Lets operations on the meta device say once what they give for tensors of the same form."""

from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from danceopd.models.footprint import storage_number, tensors_in

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Remembered(TorchDispatchMode):
    """Gives what an operation gave before for tensors of the same form, where only forms exist.

    On the meta device many operations are Python that takes up to a millisecond, and a transformer's blocks ask the
    same ones again and again. Those that change or share memory, and those that see a tensor with values, run always.

    Args:
        known: What operations gave before; it is added to.
    """

    def __init__(self, known: dict[tuple, list | tuple | None] | None = None):
        super().__init__()
        self.known = {} if known is None else known

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        form = _form((args, kwargs)) if _makes_anew(func) else None
        if form is None:
            return func(*args, **kwargs)
        key = func, form
        if key not in self.known:
            out = func(*args, **kwargs)
            self.known[key] = _forms_of(out, {storage_number(tensor) for tensor in tensors_in((args, kwargs))})
            return out
        if (forms := self.known[key]) is None:
            return func(*args, **kwargs)
        if isinstance(forms, tuple):
            return _made(forms)
        return tuple(None if one is None else _made(one) for one in forms)  # such as a gradient that nobody wants


@cache
def _makes_anew(func) -> bool:
    """Tells whether an operation neither changes nor gives back the memory of its arguments, by its schema."""
    schema = func._schema
    return all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


def _form(value):
    """Gives what an operation's arguments are but for values of tensors; None where a tensor has values."""
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or not value.is_meta:
            return None
        return value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item]
    elif not isinstance(value, (list, tuple)):
        return (type(value), value) if isinstance(value, PLAIN) else None
    forms = tuple(map(_form, value))
    return None if None in forms else forms


def _forms_of(out, before: set[int]):
    """Gives the form of an operation's result, a list for several; None where it isn't memory of its own like that."""
    outs = out if isinstance(out, tuple) else (out,)
    tensors = [one for one in outs if one is not None]
    forms = [None if one is None else _form(one) for one in outs]
    if not all(isinstance(one, torch.Tensor) and _form(one) for one in tensors):
        return None
    storages = {storage_number(tensor) for tensor in tensors}
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
    if len(storages) < len(tensors) or storages & before or sizes != [_made(_form(one)).nbytes for one in tensors]:
        return None
    return forms if isinstance(out, tuple) else forms[0]


def _made(form: tuple) -> torch.Tensor:
    shape, strides, dtype = form
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
