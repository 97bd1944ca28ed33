"""The nodes of a stage as a tree of modules, for people to open branch by branch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Group", "Tree", "hierarchy"]

MOST = 30
"""Children of a group; longer runs are gathered in groups of neighbours."""

_DEEPEST = 40
"""Levels; what lies deeper in the modules is listed flat."""


@dataclass(frozen=True)
class Group:
    """Neighbours in the order of execution that belong together.

    Attributes:
        label: What tells it from its siblings: the rest of the module path, or first and last.
        path: Qualified name of the module; of a mere run of neighbours that of the module around.
        children: Groups and indices of nodes, in the order of execution.
    """

    label: str
    path: str
    children: tuple[Tree, ...]


Tree = Group | int
"""A group, or the index of a node."""

_Item = tuple[tuple[str, ...], int]


def hierarchy(paths: Sequence[str], *, most: int = MOST) -> tuple[Tree, ...]:
    """Arrange nodes, given in the order of execution, by their module paths.

    Only neighbours are put together, so that groups depend on each other in one direction: a module
    that is called twice makes two groups. One with a single node is that node.

    Args:
        paths: Qualified name of the module of every node; empty for the model's own.
        most: Largest number of children.

    Returns:
        The top level.

    >>> [getattr(item, "label", item) for item in hierarchy(["a.x", "a.y", "b", "a.x", "a.y"])]
    ['a', 2, 'a']
    """
    items = [(tuple(path.split(".")) if path else (), i) for i, path in enumerate(paths)]
    return _level(items, 0, 0, most)


def _level(items: Sequence[_Item], known: int, depth: int, most: int) -> tuple[Tree, ...]:
    """Arrange items that share the first `known` atoms of their paths."""
    found: list[Tree] = []
    for run in _runs(items, known):
        if len(run) == 1 or len(run[0][0]) <= known:
            found += [index for _, index in run]
            continue
        shared = _shared([atoms for atoms, _ in run])
        label, path = ".".join(shared[known:]), ".".join(shared)
        if depth < _DEEPEST:
            inside = _level(run, len(shared), depth + 1, most)
        else:
            inside = _gathered([index for _, index in run], path, most)
        found.append(Group(label, path, inside))
    return _gathered(found, ".".join(items[0][0][:known]) if items else "", most)


def _shared(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The atoms that all paths begin with: those that the first and the last in order share."""
    first, last = min(paths), max(paths)
    pairs = zip(first, last, strict=False)  # of different lengths
    return first[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]


def _runs(items: Sequence[_Item], known: int) -> list[list[_Item]]:
    """Split into runs of neighbours whose next atom is the same."""
    runs: list[list[_Item]] = []
    last: str | None = None
    for item in items:
        atom = item[0][known] if len(item[0]) > known else None
        if runs and atom == last:
            runs[-1].append(item)
        else:
            runs.append([item])
        last = atom
    return runs


def _gathered(children: Sequence[Tree], path: str, most: int) -> tuple[Tree, ...]:
    """Put neighbours together until there are no more than `most`."""
    while len(children) > most:
        parts = math.ceil(len(children) / most)
        size = math.ceil(len(children) / parts)
        slices = [children[at : at + size] for at in range(0, len(children), size)]
        children = [Group("", path, tuple(part)) for part in slices]
    return tuple(children)
