"""Edits that damage an artifact, as a disk, a careless hand or a hostile one would."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

JSON_FILES = ("plan.json", "program.json")
TENSOR_FILES = ("program.safetensors", "weights.safetensors")
FILES = (*JSON_FILES, *TENSOR_FILES)

ABSURD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1000, 2**31, 10**9, 2**63, 10**400, 0.5, -1e308, 1e308,
    float("nan"), float("inf"), "", "x", "\ud800", "\x1b[2J\x07", "[red]", "[/bold]", "a" * 5000,
    "0", "nan", [], {}, [[]], [0], [2, 10**9], {"tuple": []}, {"node": "x"}, {"tensor": "x"},
    {"float": "nan"}, {"dtype": "int64"}, {"dtype": "qint8"}, {"device": "cuda:7"},
    {"device": "meta"}, {"slice": [None, None, 0]}, {"complex": [0, 1]}, {"x": 1, "y": 2},
)  # fmt: skip

CODE = "__import__('os').mkdir({flag!r})"
TARGETS = (
    "os.system", "builtins.eval", "builtins.exec", "torch.load", "torch.hub.load",
    "torch.os.system", "torch.nn.functional.os.system", "torch.ops.aten.from_file.default",
    "torch.jit.load", "torch.ops.aten.segment_reduce.default", "torch.compile",
    "torch.ops.aten._fft_r2c.default", "torch.nn.Module", "torch.nn.LSTM", "torch.as_strided",
    "torch.nn.functional.embedding", "torch.ops.aten.set_.default", "torch.zeros",
    "torch.ops.aten.max_pool2d_with_indices_backward.default", "torch.Tensor.data_ptr",
    "torch.ops.aten.native_batch_norm.default", "share_memory_", "numpy", "apply_",
    "torch.ops.aten.zeros.default", "operator.getitem", "builtins.getattr", "__reduce__",
)  # fmt: skip


class Case:
    """A folder to damage, another intact one, and what is drawn.

    Args:
        folder: A copy of an artifact.
        other: Another artifact.
        draw: Source of random numbers.
        flag: A path that hostile code would make.
    """

    def __init__(self, folder: Path, other: Path, draw: random.Random, flag: Path) -> None:
        self.folder = folder
        self.other = other
        self.draw = draw
        self.flag = flag

    def file(self, names: tuple[str, ...] = FILES) -> Path:
        return self.folder / self.draw.choice(names)


def _spots(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield all containers with the keys in them."""
    pending = [data]
    while pending:
        value = pending.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield value, key
            if isinstance(inner, (dict, list)):
                pending.append(inner)


def _edit_json(case: Case, change: Callable[[Any, Any, list[tuple[Any, Any]]], None]) -> None:
    file = case.file(JSON_FILES)
    data = json.loads(file.read_text())
    spots = list(_spots(data))
    for _ in range(case.draw.choice((1, 1, 1, 2, 4))):
        place, key = case.draw.choice(spots)
        if key in (place if isinstance(place, dict) else range(len(place))):
            change(place, key, spots)
    file.write_text(json.dumps(data))


def flip_bits(case: Case) -> None:
    """Flip one bit, or a few."""
    file = case.file()
    data = bytearray(file.read_bytes())
    for _ in range(case.draw.choice((1, 1, 1, 3, 20))):
        data[case.draw.randrange(len(data))] ^= 1 << case.draw.randrange(8)
    file.write_bytes(data)


def cut(case: Case) -> None:
    """Cut the end off."""
    file = case.file()
    data = file.read_bytes()
    file.write_bytes(data[: case.draw.randrange(len(data))])


def repeat_bytes(case: Case) -> None:
    """Repeat, drop or zero a stretch of bytes."""
    file = case.file()
    data = file.read_bytes()
    start = case.draw.randrange(len(data))
    stop = min(len(data), start + case.draw.randrange(1, 4000))
    part = case.draw.choice((b"", data[start:stop] * 2, bytes(stop - start)))
    file.write_bytes(data[:start] + part + data[stop:])


def swap_files(case: Case) -> None:
    """Exchange two files, take one of another artifact, or remove one."""
    one, two = case.folder / case.draw.choice(FILES), case.folder / case.draw.choice(FILES)
    kind = case.draw.randrange(3)
    if kind == 0:
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    elif kind == 1:
        one.write_bytes((case.other / one.name).read_bytes())
    else:
        one.unlink()


def delete_key(case: Case) -> None:
    """Delete a key or an item."""

    def change(place: Any, key: Any, _: list[tuple[Any, Any]]) -> None:
        del place[key]

    _edit_json(case, change)


def repeat_item(case: Case) -> None:
    """Repeat an item of a list, or put a value under another key."""

    def change(place: Any, key: Any, spots: list[tuple[Any, Any]]) -> None:
        if isinstance(place, list):
            place.insert(case.draw.randrange(len(place) + 1), place[key])
        else:
            place[case.draw.choice((str(key) * 2, "same_as", "meta", "key", "by_mode"))] = place[
                key
            ]

    _edit_json(case, change)


def absurd_value(case: Case) -> None:
    """Replace a value by an absurd one."""

    def change(place: Any, key: Any, _: list[tuple[Any, Any]]) -> None:
        place[key] = case.draw.choice(ABSURD)

    _edit_json(case, change)


def absurd_alike(case: Case) -> None:
    """Replace a value by an absurd one of its type."""

    def change(place: Any, key: Any, spots: list[tuple[Any, Any]]) -> None:
        place, key = _leaf(case, spots)
        alike = [value for value in ABSURD if type(value) is type(place[key])]
        place[key] = case.draw.choice(alike or ABSURD)

    _edit_json(case, change)


def value_from_elsewhere(case: Case) -> None:
    """Replace a value by another one of the same file and type."""

    def change(place: Any, key: Any, spots: list[tuple[Any, Any]]) -> None:
        if case.draw.random() < 0.7:
            place, key = _leaf(case, spots)
        kind = type(place[key])
        others = [other[k] for other, k in spots if k in _keys(other) and type(other[k]) is kind]
        place[key] = json.loads(json.dumps(case.draw.choice(others)))

    _edit_json(case, change)


def _leaf(case: Case, spots: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    leaves = [(p, k) for p, k in spots if k in _keys(p) and not isinstance(p[k], (dict, list))]
    return case.draw.choice(leaves)


def _keys(place: Any) -> Any:
    return place if isinstance(place, dict) else range(len(place))


def huge_number(case: Case) -> None:
    """Make a number huge: a size, a rank, a count, a number of layers."""

    def change(place: Any, key: Any, spots: list[tuple[Any, Any]]) -> None:
        numbers = [(p, k) for p, k in spots if k in _keys(p) and type(p[k]) is int]
        place, key = case.draw.choice(numbers)
        place[key] = case.draw.choice(
            (10**5, 10**6, 10**9, 10**12, 2**62, -(10**9), place[key] * 2)
        )

    _edit_json(case, change)


def hostile_name(case: Case) -> None:
    """Put code or the name of a function where a text is."""
    code = CODE.format(flag=str(case.flag))
    texts = (code, f'x"+{code}+"', f"x']({code})", f"x\n{code}", f"lambda: {code}", *TARGETS * 2)

    def change(place: Any, key: Any, spots: list[tuple[Any, Any]]) -> None:
        strings = [(p, k) for p, k in spots if k in _keys(p) and type(p[k]) is str]
        wanted = ("target", "class", "name", "family", "path")
        if case.draw.random() < 0.6:
            strings = [(p, k) for p, k in strings if k in wanted] or strings
        place, key = case.draw.choice(strings)
        place[key] = case.draw.choice(texts)

    _edit_json(case, change)


def tensor_header(case: Case) -> None:
    """Edit the header of a file of tensors: names, types, shapes and offsets."""
    file = case.file(TENSOR_FILES)
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    spots = [(p, k) for p, k in _spots(header)]
    place, key = case.draw.choice(spots)
    if case.draw.random() < 0.3:
        del place[key]
    else:
        values = (*ABSURD[:24], "F64", "F16", "I64", "BOOL", [2, 2], [10**9, 10**9], [0, 8])
        place[key] = case.draw.choice(values)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def pickle_instead(case: Case) -> None:
    """Put a pickle that runs code in place of a file."""
    flag = str(case.flag)
    payload = f"cos\nmkdir\n(V{flag}\ntR.".encode()
    case.file().write_bytes(payload)


EDITS: tuple[Callable[[Case], None], ...] = (
    flip_bits, cut, repeat_bytes, swap_files, delete_key, repeat_item, absurd_value, absurd_alike,
    absurd_alike, value_from_elsewhere, value_from_elsewhere, huge_number, hostile_name,
    tensor_header, pickle_instead,
)  # fmt: skip
