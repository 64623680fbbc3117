"""Expert parallelism behind the interfaces of torchtitan and Megatron."""

from __future__ import annotations

import parallel_trainers as trainers
import pytest
from ranks import run_ranks


@pytest.mark.parametrize("form", trainers.FORMS)
def test_a_trainers_layer_is_that_of_one_process(form: str) -> None:
    for found in run_ranks(2, trainers.against_one_process, form, (21, 40)):
        assert set(found) == {"out", "dx", "dscores", "dw1", "dw2"}
        assert max(found.values()) < 1e-12, found
