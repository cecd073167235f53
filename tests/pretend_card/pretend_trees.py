"""Arguments and results of operations: tuples, lists and dicts of them, and nothing else.

torch.utils._pytree knows more kinds, and takes most of the pretend card's time with them.
"""

from collections.abc import Callable

NESTS = (tuple, list, dict)  # exactly these; named tuples and sizes are values


def tree_leaves(tree) -> list:
    """Lists the values in their order."""
    if type(tree) not in NESTS:
        return [tree]
    found = []
    for value in tree.values() if type(tree) is dict else tree:
        if type(value) in NESTS:
            found += tree_leaves(value)
        else:
            found.append(value)
    return found


def tree_map(make: Callable, tree):
    """Makes the same nests of what `make` makes of each value."""
    if type(tree) not in NESTS:
        return make(tree)
    if type(tree) is dict:
        return {key: tree_map(make, value) for key, value in tree.items()}
    return type(tree)([tree_map(make, value) for value in tree])
