"""Argument lists of ops: schema text, flat lists and NamedTuples agree, whatever the nesting and the order of types."""

from __future__ import annotations

from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor

from supersonic_moe.training import arguments
from supersonic_moe.training.fields import Fields, on_flat

T = TypeVar("T")


class Pair(NamedTuple, Generic[T]):
    first: T
    second: T


class Weight(NamedTuple):
    q: Tensor
    name: str
    scale: Tensor | None


class Call(NamedTuple):
    save: bool
    x: Tensor
    w: Weight
    wanted: Pair[bool]
    alpha: float
    main: Annotated[Tensor | None, "a!"]
    into: Annotated[Tensor, "b!"]


def call(x: Any = "x", q: Any = "q") -> Call:
    return Call(True, x, Weight(q, "name", None), Pair(False, True), 0.5, None, "into")  # type: ignore[arg-type]


def test_schema_names_tensors_first_and_is_one_that_torch_reads() -> None:
    schema = Fields(Call).schema
    assert schema == (
        "Tensor x, Tensor w_q, Tensor? w_scale, Tensor(a!)? main, Tensor(b!) into, "
        "bool save, str w_name, bool wanted_first, bool wanted_second, float alpha"
    )
    parsed = torch._C.parse_schema(f"f({schema}) -> ()")
    assert [argument.name for argument in parsed.arguments] == Fields(Call).names
    assert [a.name for a in parsed.arguments if a.alias_info and a.alias_info.is_write] == ["main", "into"]


def test_lists_are_flattened_and_built_again() -> None:
    fields = Fields(Call)
    tensors, others = ("x", "q", None, None, "into"), (True, "name", False, True, 0.5)
    assert fields.flat(*call()) == (*tensors, *others)
    assert fields.split(*call()) == (tensors, others)
    assert on_flat(lambda *built: built, fields)(*tensors, *others) == (call(),)


def test_lists_one_after_the_other() -> None:
    def both(first: Weight, second: Call) -> tuple[Weight, Call]:
        return first, second

    lists = Fields(Weight), Fields(Call)
    given = Weight("a", "b", "c"), call(x="z")  # type: ignore[arg-type]
    flat = [*lists[0].flat(*given[0]), *lists[1].flat(*given[1])]
    first, second = on_flat(both, *lists)(*flat)
    assert (first, second) == given
    assert isinstance(second.w, Weight) and isinstance(second.wanted, Pair)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'alpha'"):
        on_flat(both, *lists)(*flat[:-1])


def test_a_type_that_no_schema_has_is_refused() -> None:
    class Wrong(NamedTuple):
        x: Tensor
        sizes: dict[str, int]

    with pytest.raises(KeyError, match="dict"):
        Fields(Wrong)


LISTS = [
    getattr(arguments, name)
    for name in ("Bf16Forward", "Bf16Saved", "Fp8Forward", "Fp8Weights", "Fp8Saved", "Incoming")
]


@pytest.mark.parametrize("kind", LISTS, ids=lambda kind: kind.__name__)
def test_every_list_of_the_experts_keeps_each_field_in_its_place(kind: type) -> None:
    """Every leaf has a value of its own here, so a swapped pair would show."""
    fields = Fields(kind)
    built = on_flat(lambda call: call, fields)(*fields.names)
    assert list(fields.flat(*built)) == fields.names
    for name in fields.names:
        at: Any = built
        rest = name
        while not isinstance(at, str):
            found = max((f for f in at._fields if rest == f or rest.startswith(f"{f}_")), key=len)
            at, rest = getattr(at, found), rest[len(found) + 1 :]
        assert at == name
