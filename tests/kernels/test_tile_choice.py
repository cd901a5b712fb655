# SPDX-License-Identifier: Apache-2.0
"""The choice of the run-time layout: what it may be, and that it stays."""

import numpy as np
import pytest

from ternaryforge import _core

MANY = 2**25


@pytest.mark.parametrize("threads", [1, 2])
def test_the_choice_is_made_once(target: str, threads: int) -> None:
    chosen = {_core.kernels.fastest_layout(MANY, activations="int8", threads=threads) for _ in range(3)}
    assert len(chosen) == 1
    assert chosen <= ({"t16"} if target == "scalar" else {"t16", "t20"})


def test_nothing_is_measured_where_it_does_not_matter() -> None:
    assert _core.kernels.fastest_layout(MANY - 1, activations="int8") == "t16"
    assert _core.kernels.fastest_layout(2**40, activations="float") == "t16"


def test_times_are_one_a_pass() -> None:
    tensor = _core.formats.PackedTensor(
        "t20", 16, 20, _core.formats.pack(np.zeros((16, 20), "int8"), "t20"),
        scale_kind="tensor", scales=np.ones(1, "float32"),
    )  # fmt: skip
    seconds = _core.kernels.time_linear(tensor, 3, activations="int16", passes=4)
    assert len(seconds) == 4
    assert min(seconds) > 0
