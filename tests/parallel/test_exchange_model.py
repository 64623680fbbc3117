"""The exchange between GPUs as a model: every interleaving is right, and the model notices when a rule is broken."""

from __future__ import annotations

import pytest
from exchange_model import RIGHT, Rules, explore, program

ORDERS = {
    "as a layer runs": RIGHT.exchanges,
    "pulls": (("pull", 0), ("pull", 1)),
    "pushes": (("push", 0), ("push", 1)),
    "pulls through one bank": (("pull", 0),),
    "pushes through one bank": (("push", 0),),
    "posts": (("post", 0),),
    "a graph of three": (("pull", 1), ("pull", 0), ("push", 1), ("pull", 1), ("pull", 0), ("push", 1)),
}


@pytest.mark.parametrize("exchanges", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(("ranks", "epochs"), [(2, 7), (3, 2)])
def test_every_interleaving_reads_what_it_waited_for_and_ends(ranks: int, epochs: int, exchanges: tuple) -> None:
    outcome = explore(ranks, epochs, Rules(exchanges))
    assert outcome.states > 100 and not outcome.wrong and not outcome.stuck


@pytest.mark.parametrize(
    "broken",
    [
        Rules(ORDERS["pulls through one bank"], room=False),
        Rules(ORDERS["pushes through one bank"], room=False),
        Rules(ORDERS["posts"], flag_after_data=False),
        Rules(ORDERS["posts"], slack=1),
        Rules(flag_after_data=False),
        Rules(slack=1),
    ],
    ids=[
        "no room for pulls",
        "no room for pushes",
        "posts told before",
        "posts read before",
        "flag before data",
        "an epoch too early",
    ],
)
def test_a_broken_rule_is_found(broken: Rules) -> None:
    assert explore(2, 5, broken).wrong


@pytest.mark.parametrize("steps", range(0, len(program(1, 3, 1, RIGHT)), 2))
def test_whoever_waits_for_a_dead_rank_leads_to_it(steps: int) -> None:
    """Following from each waiting rank to the rank that it waits for ends at the dead one: its name can be said."""
    outcome = explore(3, 2, stopped={1: steps})
    assert outcome.stuck and not outcome.wrong
    for waits in outcome.stuck:
        waits_for = dict(waits)
        for rank in waits_for:
            seen = set()
            while rank in waits_for and rank not in seen:
                seen.add(rank)
                rank = waits_for[rank]
            assert rank == 1
