# SPDX-License-Identifier: Apache-2.0
"""What the tests of the float kernels share: sizes, poisoned memory, targets that must agree to the last bit."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core

Float32 = NDArray[np.float32]

# Around the sixteen lanes, below and above, and many of them.
SIZES = (1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257, 1000)
OFFSETS = (0, 1, 3)  # elements by which data misses the alignment of a vector

FUSED_TARGETS = tuple(name for name in _core.simd.supported_targets() if name not in {"sse4", "scalar"})
ROUNDED_TARGETS = tuple(name for name in _core.simd.supported_targets() if name in {"sse4", "scalar"})


def poisoned(values: Float32, offset: int = 0) -> Float32:
    """The same values in the midst of NaN, `offset` elements behind an aligned address."""
    room = values.size + 64
    raw = np.full(room * 4 + 64, 0xFF, np.uint8)  # all bits set: a NaN
    start = -raw.ctypes.data % 64
    buffer = raw[start : start + room * 4].view(np.float32)
    assert np.isnan(buffer).all()
    begin = 16 + offset
    view = buffer[begin : begin + values.size]
    view[:] = values.ravel()
    return view.reshape(values.shape)


def assert_same_bits(first: Float32, second: Float32) -> None:
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_array_equal(first.view(np.uint32), second.view(np.uint32))


def assert_targets_agree(kernel: Callable[[], Float32]) -> None:
    """All targets that fuse multiply-add give the same bits, and so do all that do not."""
    previous = _core.simd.active_target()
    try:
        for names in (FUSED_TARGETS, ROUNDED_TARGETS):
            results = []
            for name in names:
                _core.simd.use_target(name)
                assert _core.simd.dispatched_target() == name
                results.append(kernel())
            for result in results[1:]:
                assert_same_bits(result, results[0])
    finally:
        _core.simd.use_target(previous)
