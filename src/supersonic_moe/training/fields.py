"""Argument lists of ops, written once: a NamedTuple becomes schema text, a flat list, and a NamedTuple again.

``torch.library`` ops take flat lists of tensors, bools, strings and floats. Two lists of thirty, kept in step by hand
at five places, are where a swapped pair of arguments hides. So each list is a NamedTuple, whose fields may be
NamedTuples, and :class:`Fields` derives the rest from its annotations:

    class Quantized(NamedTuple):          Fields(Call).schema    "Tensor x, Tensor w1_q, Tensor? w1_scale, bool save"
        q: Tensor                         Fields(Call).flat      (call.x, call.w1.q, call.w1.scale, call.save)
        scale: Tensor | None              Fields(Call).build     Call(x, Quantized(w1_q, w1_scale), save)

    class Call(NamedTuple):
        x: Tensor
        save: bool
        w1: Quantized

Tensors come first, whatever the order of the fields: so ``save_for_backward`` takes one part of the list and the
context the other. ``flat`` and ``build`` are expressions compiled once, like the methods of a NamedTuple, because a
step of a layer calls each of them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", str: "str", float: "float"}

N = TypeVar("N")


class _Leaf(NamedTuple):
    path: tuple[str, ...]
    hint: Any

    @property
    def name(self) -> str:
        return "_".join(self.path)

    @property
    def is_tensor(self) -> bool:
        return self.type.startswith("Tensor")

    @property
    def type(self) -> str:
        """Its type in a schema. ``Annotated[Tensor, "a!"]`` is a tensor that the op writes to."""
        if get_origin(self.hint) is not Annotated:
            return _SCHEMA_TYPES[self.hint]
        hint, alias = get_args(self.hint)
        return _SCHEMA_TYPES[hint].replace("Tensor", f"Tensor({alias})")


class Fields(Generic[N]):
    """The fields of the NamedTuple ``kind``, and of the NamedTuples in it."""

    def __init__(self, kind: type[N]) -> None:
        leaves = list(_leaves(kind, ()))
        tensors, others = [f for f in leaves if f.is_tensor], [f for f in leaves if not f.is_tensor]
        self.names = [f.name for f in (*tensors, *others)]
        self.schema = ", ".join(f"{f.type} {f.name}" for f in (*tensors, *others))
        self.flat: Callable[[N], tuple[Any, ...]] = _compiled(["call"], _values([*tensors, *others]))
        """The leaves of a ``kind``, in the order of ``schema``."""
        self.split: Callable[[N], tuple[tuple[Tensor | None, ...], tuple[bool | str | float, ...]]]
        self.split = _compiled(["call"], f"({_values(tensors)}, {_values(others)})")
        """The same in two parts: tensors, and what else there is."""
        self.build: Callable[..., N] = _compiled(self.names, *_construction(kind, ()))
        """A ``kind`` of its leaves."""


def joined(*lists: Fields[Any]) -> Callable[..., tuple[Any, ...]]:
    """One after the other: a function from the flat arguments of all ``lists`` to a NamedTuple for each."""
    builds = {f"build_{i}": fields.build for i, fields in enumerate(lists)}
    calls = [f"{build}({', '.join(fields.names)})" for build, fields in zip(builds, lists, strict=True)]
    return _compiled([name for fields in lists for name in fields.names], f"({', '.join(calls)},)", builds)


def _members(kind: Any) -> dict[str, Any]:
    """Name and type of each field; those of a generic NamedTuple with its parameters filled in."""
    origin, given = get_origin(kind) or kind, get_args(kind)
    meaning = dict(zip(origin.__parameters__, given, strict=True)) if given else {}
    return {name: meaning.get(hint, hint) for name, hint in get_type_hints(origin, include_extras=True).items()}


def _leaves(kind: Any, path: tuple[str, ...]) -> Iterator[_Leaf]:
    for name, hint in _members(kind).items():
        if hasattr(hint, "_fields"):
            yield from _leaves(hint, (*path, name))
        else:
            yield _Leaf((*path, name), hint)


def _construction(kind: Any, path: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """An expression that makes a ``kind`` of variables called like its leaves, and the classes in it."""
    origin = get_origin(kind) or kind
    arguments, classes = [], {origin.__name__: origin}
    for name, hint in _members(kind).items():
        if hasattr(hint, "_fields"):
            argument, inner = _construction(hint, (*path, name))
            classes |= inner
        else:
            argument = _Leaf((*path, name), hint).name
        arguments.append(argument)
    return f"{origin.__name__}({', '.join(arguments)})", classes


def _values(leaves: list[_Leaf]) -> str:
    """An expression: the tuple of these leaves of ``call``."""
    return f"({''.join('call.' + '.'.join(leaf.path) + ', ' for leaf in leaves)})"


def _compiled(arguments: list[str], expression: str, names: dict[str, Any] | None = None) -> Callable[..., Any]:
    function: Callable[..., Any] = eval(f"lambda {', '.join(arguments)}: {expression}", {**(names or {})})
    return function
