"""``keep_received`` and ``channels``: what is kept from forward to backward, and calls in flight at the same time."""

from __future__ import annotations

import re

import parallel_cases as cases
import parallel_flight as flight
import pytest
import torch
from ranks import run_ranks

from supersonic_moe import Fp8Recipe

WAYS = [{}, {"capacity": 64}, {"transport": "gather"}]
NAMES = ["exact", "capacity", "gather"]


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_tokens_that_are_sent_again_give_the_bits_of_those_that_are_kept(way: dict) -> None:
    calls = [((33, 0), torch.bfloat16, "random", True), ((7, 40), torch.float32, "masked", False)]
    assert run_ranks(2, cases.same_as_one_process, calls, way | {"keep_received": False}) == [[], []]


def test_codes_that_are_sent_again_give_the_bits_of_those_that_are_kept() -> None:
    recipe = Fp8Recipe(scale="pow2", save_preactivation="recompute")
    way = {"keep_received": False}
    assert run_ranks(2, cases.over_an_fp8_wire, (70, 53), recipe, False, 136, way) == [[], []]


@pytest.mark.parametrize("fp8", [False, True], ids=["exact wire", "FP8 wire"])
@pytest.mark.parametrize("way", WAYS[::2], ids=NAMES[::2])
def test_received_tokens_are_gone_after_forward_where_they_are_sent_again(way: dict, fp8: bool) -> None:
    assert run_ranks(2, flight.received_alive, way, fp8) == [[1, 0]] * 2


def test_explain_says_what_is_sent_again_and_how_many_channels_there_are() -> None:
    for plain, both in run_ranks(2, flight.explained):
        once, twice = (float(re.search(r"backward  dout\D*([\d.]+)", text)[1]) for text in (plain, both))  # type: ignore[index]
        assert "dout and x again" in both and twice == pytest.approx(2 * once, rel=0.01)
        assert "channels: 2, each with a process group" in both and "channels" not in plain


def test_tokens_that_changed_are_not_sent_again() -> None:
    for error in run_ranks(2, flight.changed_in_place):
        assert "x was changed in place between forward and backward, which sends it once more" in error


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "sent again"])
def test_experts_alone_can_be_recomputed(keep: bool) -> None:
    assert run_ranks(2, flight.checkpointed, (13, 5), {"keep_received": keep}) == [[], []]


@pytest.mark.parametrize("way", WAYS[::2], ids=NAMES[::2])
def test_two_threads_have_a_channel_each(way: dict) -> None:
    for *errors, first, second in run_ranks(2, flight.in_two_threads, 12, way):
        assert (first, second) == ("channel 0 is done", "channel 1 is done")
        for error, got in zip(errors, ("'0'", "2"), strict=True):
            assert f"a channel must be at least 0 and less than channels = 2 of the ExpertParallel; got {got}" in error
