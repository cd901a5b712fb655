# SPDX-License-Identifier: Apache-2.0
"""Which scales go into which layout: every cell of the table of docs/reference/formats.md, exact or refused."""

import numpy as np
import pytest

from ternaryforge import _core

formats = _core.formats
ROWS, COLS = 6, 1024


def halves(*shape: int) -> np.ndarray:
    """Distinct scales that f16 holds."""
    count = int(np.prod(shape))
    return np.float16(np.linspace(0.05, 1, count)).astype(np.float32).reshape(shape)


SCALES = {
    "tensor": halves(1),
    "tensor, f32": np.array([0.05], np.float32),
    "row": halves(ROWS),
    "row, f32": halves(ROWS) * np.float32(1 + 2**-20),
    "group 256": halves(ROWS, COLS // 256),
    "group 128": halves(ROWS, COLS // 128),
    "group 64": halves(ROWS, COLS // 64),
    "group 64, f32": halves(ROWS, COLS // 64) * np.float32(1 + 2**-20),
}
TENSORS, ROW_SCALES = {"tensor"}, {"tensor", "row"}
IN_256 = ROW_SCALES | {"group 256"}
IN_128 = IN_256 | {"group 128"}
EXACT = {
    "tq1_0": IN_256,
    "tq2_0": IN_256,
    "q2_k": IN_256,
    "pq2_0": IN_128,
    "ptq1_0": IN_128,
    "q2_0": IN_128 | {"group 64"},
    "q4_0": IN_128 | {"group 64"},
    "i2_s": TENSORS | {"tensor, f32"},
    "iq2_bn": ROW_SCALES | {"tensor, f32", "row, f32"},
    "iq1_bn": ROW_SCALES,
}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("layout", EXACT)
def test_exact_or_refused(layout: str, kind: str) -> None:
    trits = np.random.default_rng(7).integers(-1, 2, (ROWS, COLS)).astype(np.int8)
    scales = SCALES[kind]
    if kind not in EXACT[layout]:
        with pytest.raises(ValueError, match=r"share one scale|shares one scale|f16 does not hold the scale"):
            formats.encode_ternary(layout, trits, scales)
        return
    decoded, stored = formats.decode_ternary(layout, formats.encode_ternary(layout, trits, scales), ROWS, COLS)
    np.testing.assert_array_equal(decoded, trits)
    per_row = scales.reshape(-1, 1) if scales.ndim == 1 else scales
    expected = np.broadcast_to(np.repeat(per_row, COLS // per_row.shape[1], axis=1), (ROWS, COLS))
    unit = COLS // stored.shape[1]
    np.testing.assert_array_equal(np.broadcast_to(np.repeat(stored, unit, axis=1), (ROWS, COLS)), expected)
    found, group_size, collapsed = formats.collapse_scales(
        np.ascontiguousarray(np.broadcast_to(stored, (ROWS, stored.shape[1]))), COLS, unit
    )
    assert kind.startswith(found), "the coarsest kind comes back"
    assert group_size == (COLS // scales.shape[1] if found == "group" else 0)
    np.testing.assert_array_equal(collapsed, scales)
