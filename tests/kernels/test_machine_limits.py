# SPDX-License-Identifier: Apache-2.0
"""The measurements that benchmarks divide by. Each checks its own sum and raises where it is wrong."""

import pytest

from ternaryforge import _core


@pytest.mark.parametrize("size", [1, 255, 4096, 1_000_001])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_word_is_read_once(target: str, size: int, threads: int) -> None:
    assert _core.kernels.read_bandwidth(size=size, passes=3, threads=threads) > 0


@pytest.mark.parametrize("rounds", [1, 5, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_product_is_added_once(target: str, rounds: int, threads: int) -> None:
    assert _core.kernels.dot_peak(rounds=rounds, passes=2, threads=threads) > 0


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[machine_limits\] bytes and passes are positive, got 0 and 1"):
        _core.kernels.read_bandwidth(size=0, passes=1, threads=1)
    with pytest.raises(ValueError, match=r"\[machine_limits\] rounds and passes are positive, got 1 and 0"):
        _core.kernels.dot_peak(rounds=1, passes=0, threads=1)
    with pytest.raises(ValueError, match="at least one thread"):
        _core.kernels.dot_peak(rounds=1, passes=1, threads=0)
