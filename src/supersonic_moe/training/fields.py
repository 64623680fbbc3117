"""Argument lists of ops, written once: a NamedTuple becomes schema text, a flat list, and a NamedTuple again.

``torch.library`` ops take flat lists of tensors, bools, strings and numbers. Two lists of thirty, kept in step by hand
at five places, are where a swapped pair of arguments hides. So each list is a NamedTuple, whose fields may be
NamedTuples, and :class:`Fields` derives the rest from its annotations:

    class Quantized(NamedTuple):    Fields(Call).schema              "Tensor x, Tensor w_q, Tensor? w_scale, bool save"
        q: Tensor                   Fields(Call).flat(x, save, w)    (x, w.q, w.scale, save)
        scale: Tensor | None        Fields(Call).split(x, save, w)   ((x, w.q, w.scale), (save,))
                                    on_flat(run, Fields(Call))       a function of (x, w_q, w_scale, save), which
    class Call(NamedTuple):                                          calls run(Call(x, save, Quantized(w_q, w_scale)))
        x: Tensor
        save: bool
        w: Quantized

Tensors come first, whatever the order of the fields: so ``save_for_backward`` takes one part of the list and the
context the other. Functions are compiled once, as the methods of a NamedTuple are, because every step of a layer calls
all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Generic, NamedTuple, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "SymInt", str: "str", float: "float"}

P = ParamSpec("P")
N = TypeVar("N")
R = TypeVar("R")


class Fields(Generic[P, N]):
    """The fields of the NamedTuple ``kind``, and of the NamedTuples in it."""

    def __init__(self, kind: Callable[P, N]) -> None:
        leaves = _leaves(kind, "")
        tensors, others = [f for f in leaves if f.is_tensor], [f for f in leaves if not f.is_tensor]
        self.names = [f.name for f in (*tensors, *others)]
        self.schema = ", ".join(f"{f.type} {f.name}" for f in (*tensors, *others))

        fields, groups = list(_members(kind)), _unpacked(kind, "")
        self.flat: Callable[P, tuple[Any, ...]]
        self.flat = _function(fields, groups, _tuple(f.name for f in (*tensors, *others)))
        """Of the fields of a ``kind``: its leaves in the order of ``schema``."""
        self.split: Callable[P, tuple[tuple[Tensor | None, ...], tuple[bool | str | float, ...]]]
        self.split = _function(fields, groups, f"{_tuple(f.name for f in tensors)}, {_tuple(f.name for f in others)}")
        """The same in two parts: tensors, and what else there is."""
        self.classes: dict[str, Any] = {"new": tuple.__new__}
        self.construction = _construction(kind, "", self.classes)
        """An expression that makes a ``kind`` of variables called like its leaves, and the names in it."""


def on_flat(run: Callable[..., R], *lists: Fields[..., Any]) -> Callable[..., R]:
    """``run``, which takes a NamedTuple for each of ``lists``, as a function of all their leaves."""
    names = [name for fields in lists for name in fields.names]
    known = {name: value for fields in lists for name, value in fields.classes.items()}
    return _function(names, [], f"run({', '.join(fields.construction for fields in lists)})", {"run": run, **known})


class _Leaf(NamedTuple):
    name: str
    hint: Any

    @property
    def type(self) -> str:
        """In a schema. ``Annotated[Tensor, "a!"]`` is a tensor that the op writes to."""
        if get_origin(self.hint) is not Annotated:
            return _SCHEMA_TYPES[self.hint]
        hint, alias = get_args(self.hint)
        return _SCHEMA_TYPES[hint].replace("Tensor", f"Tensor({alias})")

    @property
    def is_tensor(self) -> bool:
        return self.type.startswith("Tensor")


def _members(kind: Any) -> dict[str, Any]:
    """Name and type of each field; those of a generic NamedTuple with its parameters filled in."""
    origin, given = get_origin(kind) or kind, get_args(kind)
    meaning = dict(zip(origin.__parameters__, given, strict=True)) if given else {}
    return {name: meaning.get(hint, hint) for name, hint in get_type_hints(origin, include_extras=True).items()}


def _is_group(hint: Any) -> bool:
    return hasattr(hint, "_fields")


def _leaves(kind: Any, prefix: str) -> list[_Leaf]:
    leaves = []
    for name, hint in _members(kind).items():
        path = f"{prefix}{name}"
        leaves += _leaves(hint, f"{path}_") if _is_group(hint) else [_Leaf(path, hint)]
    return leaves


def _unpacked(kind: Any, prefix: str) -> list[str]:
    """Statements that turn the variables of fields which are NamedTuples into variables of leaves."""
    statements = []
    for name, hint in _members(kind).items():
        path = f"{prefix}{name}"
        if _is_group(hint):
            statements += [f"{_tuple(f'{path}_{inner}' for inner in _members(hint))} = {path}"]
            statements += _unpacked(hint, f"{path}_")
    return statements


def _construction(kind: Any, prefix: str, classes: dict[str, Any]) -> str:
    """``tuple.__new__`` itself: the one of a NamedTuple is a Python function, which takes twice as long."""
    origin = get_origin(kind) or kind
    classes[origin.__name__] = origin
    items = []
    for name, hint in _members(kind).items():
        path = f"{prefix}{name}"
        items.append(_construction(hint, f"{path}_", classes) if _is_group(hint) else path)
    return f"new({origin.__name__}, {_tuple(items)})"


def _tuple(items: Iterable[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items)})"


def _function(
    arguments: list[str], statements: list[str], result: str, names: dict[str, Any] | None = None
) -> Callable[..., Any]:
    lines = [f"def function({', '.join(arguments)}):", *statements, f"return {result}"]
    scope = dict(names or {})
    exec("\n    ".join(lines), scope)
    function: Callable[..., Any] = scope["function"]
    return function
