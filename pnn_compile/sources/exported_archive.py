"""Check what a `.pt2` file contains, and write a clean copy, before torch reads any of it.

torch's loader trusts such a file. It unpickles what a table marks so (and sample inputs that its
safe reader refuses), evaluates sizes that are texts, opens compiled libraries, resolves the target
of a node by attribute access (`torch.os.system` is one), and puts names into generated code. So
members, tables, targets, names and expressions are checked against lists here, and torch reads an
archive of what passed alone, which no second reading of a tampered zip file can change.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from passes.errors import ArtifactError, SourceError
from pnn_compile.artifact.functions import function

_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_MEMBERS = re.compile(
    rf"{re.escape(_MODEL)}|{re.escape(_SAMPLES)}|{'|'.join(map(re.escape, _CONFIGS))}"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
)
_EXTRA = "data/extra/"
"""Folder of texts that a user added to the file; they are not read."""


def checked_archive(path: Path) -> io.BytesIO:
    """Copy a file into an archive with what a saved program needs, and nothing that could run.

    Args:
        path: A file of torch.export.save.

    Returns:
        The archive, for torch.export.load.

    Raises:
        SourceError: The file is no such archive, or contains something else; the message names it.
    """
    members = _members(path)
    try:
        model = json.loads(members[_MODEL])
        tables = {name: json.loads(members[name]) for name in _CONFIGS}
    except (KeyError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not a file of torch.export.save: {error!r}") from error
    try:
        for name, table in tables.items():
            _check_table(table, name.rpartition("/")[0], members)
        _check_strings(model, "")
        model["guards_code"] = []  # code that compares inputs with those of the export
    except _Refused as refused:
        raise SourceError(
            f"{path} contains {refused}, and loading that could run any code: save it again with "
            "torch.export.save from plain tensors, or name the Python file that builds the model"
        ) from None
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(f"{path} is damaged: {error!r}") from error
    _check_samples(path, members.get(_SAMPLES, b""))
    members[_MODEL] = json.dumps(model).encode()
    clean = io.BytesIO()
    with zipfile.ZipFile(clean, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"model/{name}", data)
    clean.seek(0)
    return clean


class _Refused(Exception):
    """The file contains something that it may not; the message names it."""


def _members(path: Path) -> dict[str, bytes]:
    """Return the members by their names inside the only folder of the archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            folders = {entry.filename.partition("/")[0] for entry in entries}
            names = [entry.filename.partition("/")[2] for entry in entries]
            if _MODEL not in names:
                raise SourceError(
                    f"{path} is not a file of torch.export.save, or one of an old format: save it "
                    "again with this version of torch"
                )
            refused = [
                entry.filename
                for entry, name in zip(entries, names, strict=True)
                if not (_MEMBERS.fullmatch(name) or name.startswith(_EXTRA))
                or entry.compress_type != zipfile.ZIP_STORED  # a zip bomb is not stored
                or names.count(name) > 1
            ]
            if refused or len(folders) > 1:
                raise SourceError(
                    f"{path} contains {', '.join(map(repr, refused[:3] or sorted(folders)[:3]))}, "
                    "which torch.export.save writes for no plain program: save it again, or name "
                    "the Python file that builds the model"
                )
            return {
                name: archive.read(entry)
                for entry, name in zip(entries, names, strict=True)
                if not name.startswith(_EXTRA)
            }
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise SourceError(f"{path} is not a file of torch.export.save: {error}") from error


def _check_table(table: Any, folder: str, members: Mapping[str, bytes]) -> None:
    """Check that a table refers to raw tensors only, none without its bytes."""
    for name, entry in table["config"].items():
        _check_strings(entry, name)
        file = f"{folder}/{entry['path_name']}"
        if entry["use_pickle"] or not _MEMBERS.fullmatch(file) or file not in members:
            raise _Refused(f"a pickled object ({name!r})")
        sizes = [size["as_int"] for size in entry["tensor_meta"]["sizes"]]
        if math.prod(sizes) and not members[file]:
            raise _Refused(f"a tensor without its bytes ({name!r})")


def _check_samples(path: Path, data: bytes) -> None:
    try:
        if data:
            torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # whatever torch raises on a damaged or hostile pickle
        raise SourceError(
            f"the sample inputs of {path} cannot be read without unpickling objects, which could "
            "run any code: export with plain tensors, in tuples, lists and dicts, and save again"
        ) from error


_WORD = re.compile(r"[\w. -]*")
_TEXT = ("stack_trace", "nn_module_stack", "as_string", "as_strings", "torch_version")
"""Keys of texts that are shown, or passed to operators; none of them becomes code."""
_DROPPED = ("source_fn_stack", "torch_fn", "custom", "from_node")
"""Keys of a node's notes that torch resolves to functions; nothing here reads them."""


def _check_strings(value: Any, key: str) -> None:
    """Check every text in a table by the rule of its key; drop the notes of nodes."""
    if isinstance(value, dict):
        for name in _DROPPED:
            value.pop(name, None)
        for name, inner in value.items():
            if not (_SYMBOL if key == "range_constraints" else _WORD).fullmatch(name):
                raise _Refused(f"the name {name!r}")
            _check_strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_strings(inner, key)
    elif key in ("custom_obj_values", "as_custom_obj"):
        raise _Refused("an object of a custom class")
    elif isinstance(value, str):
        _RULES.get(key, _check_word)(value)


def _check_word(text: str) -> None:
    if not _WORD.fullmatch(text):
        raise _Refused(f"the name {text!r}")


def _check_text(text: str) -> None:
    if not all(character.isprintable() or character in "\n\t" for character in text):
        raise _Refused(f"the text {text[:40]!r}")


_MORE_TARGETS = re.compile(
    r"torch\.ops\.aten\.(_assert_tensor_metadata|_assert_scalar|_thnn_fused_(lstm|gru)_cell)\.\w+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|torch\.sym_(float|int|ite|max|min|not|sqrt|sum)"
)


def _check_target(text: str) -> None:
    """Check a node's target against the functions that an artifact may call."""
    try:
        if not _MORE_TARGETS.fullmatch(text):
            function(re.sub(r"^_operator\.", "operator.", text))
    except (ArtifactError, AttributeError):
        raise _Refused(f"a call of {text!r}") from None


def _check_structure(text: str) -> None:
    """Check a pytree spec of inputs or outputs: JSON, whose texts are names of types and keys."""

    def check(value: Any) -> None:
        if isinstance(value, dict):
            value = [*value, *value.values()]
        if isinstance(value, list):
            for inner in value:
                check(inner)
        elif isinstance(value, str):
            try:
                inner = json.loads(value)
            except ValueError:
                _check_word(value)
            else:
                check(inner)

    check(text)


_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,6}|oo|int_oo")
_FUNCTION = re.compile(
    "Abs|Add|And|CeilDiv|CeilToInt|CleanDiv|Equality|Eq|Float|FloatTrueDiv|FloorDiv|FloorToInt|Ge"
    "|GreaterThan|Gt|Identity|IntTrueDiv|Integer|Le|LessThan|Lt|Max|Min|Mod|ModularIndexing|Mul|Ne"
    "|Not|Or|PythonMod|Rational|RoundToInt|StrictGreaterThan|StrictLessThan|ToFloat|TruncToFloat"
    "|TruncToInt|Unequality|Where|ceiling|floor"
)
_OPERATORS = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.USub, ast.UAdd,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_LONGEST, _LARGEST, _POWER = 2000, 2**64, 16


def check_expression(text: str) -> None:
    """Check that a size is an expression of numbers, symbols, arithmetic and torch's functions.

    Either as people write it or as sympy does; not `__import__('os')`, `s0.real`, `9**9**9`.

    >>> check_expression("2*s0 + FloorDiv(s1, 4)")
    >>> check_expression("Mul(Integer(2), Symbol('s0', integer=True))")
    >>> check_expression("s0.real")
    Traceback (most recent call last):
    ValueError: Attribute in it

    Raises:
        ValueError: It is not; the message names the part that is refused.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"{len(text)} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not an expression") from None
    if sum(isinstance(node, ast.Pow) or _called(node) == "Pow" for node in ast.walk(tree)) > 1:
        raise ValueError("powers in it")  # a power of powers would compute forever
    _check_arithmetic(tree)


def _called(node: ast.AST) -> str:
    """Return the name of the function that a node calls by name; "" of other nodes."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _check_arithmetic(node: ast.expr) -> None:
    """Check an expression tree: the node itself, then its operands."""
    operators: list[ast.AST] = []
    parts: list[ast.expr] = []
    match node:
        case ast.Constant(value=bool() | int() | float() as number) if abs(number) < _LARGEST:
            pass
        case ast.Name(id=name) if _SYMBOL.fullmatch(name):
            pass
        case ast.Call(args=[ast.Constant(value=str(name))]) if _called(node) == "Symbol":
            keywords = [keyword.value for keyword in node.keywords]  # assumptions: integer=True
            if not _SYMBOL.fullmatch(name) or not all(
                isinstance(k, ast.Constant) for k in keywords
            ):
                raise ValueError(f"the symbol {name!r} in it")
        case ast.Call(args=[base, power], keywords=[]) if _called(node) == "Pow":
            _check_power(power)
            parts = [base]
        case ast.Call(args=arguments, keywords=[]) if _FUNCTION.fullmatch(_called(node)):
            parts = arguments
        case ast.BinOp(left=base, op=ast.Pow(), right=power):
            _check_power(power)
            parts = [base]
        case ast.BinOp(left=left, op=operator, right=right):
            operators, parts = [operator], [left, right]
        case ast.UnaryOp(op=sign, operand=operand):
            operators, parts = [sign], [operand]
        case ast.Compare(left=left, ops=comparisons, comparators=others):
            operators, parts = [*comparisons], [left, *others]
        case _:
            raise ValueError(f"{_called(node) or type(node).__name__} in it")
    for symbol in operators:
        if not isinstance(symbol, _OPERATORS):
            raise ValueError(f"{type(symbol).__name__} in it")
    for part in parts:
        _check_arithmetic(part)


def _check_power(node: ast.expr) -> None:
    match node:
        case ast.Call(args=[inner], keywords=[]) if _called(node) == "Integer":
            return _check_power(inner)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return _check_power(inner)
        case ast.Constant(value=int(power)) if abs(power) <= _POWER:
            return None
    raise ValueError("a power in it")


def _check_expression(text: str) -> None:
    try:
        check_expression(text)
    except ValueError as error:
        raise _Refused(f"the size {text[:60]!r} ({error})") from None


_RULES: Mapping[str, Callable[[str], None]] = {
    **dict.fromkeys(_TEXT, _check_text),
    "target": _check_target,
    "as_operator": _check_target,
    "expr_str": _check_expression,
    "in_spec": _check_structure,
    "out_spec": _check_structure,
    "guards_code": lambda _: None,  # the copy for torch has none
}
