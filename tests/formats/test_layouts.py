# SPDX-License-Identifier: Apache-2.0
"""Layouts against bytes worked out from their documents."""

import numpy as np
import pytest

from ternaryforge import _core
from ternaryforge._core import FormatError

formats = _core.formats


def hf_packed_from_document(trits: np.ndarray) -> np.ndarray:
    """Byte [r, k] holds rows r, r + P, r + 2P, r + 3P of column k, P = rows / 4, lowest bits first, code trit + 1."""
    quarter = trits.shape[0] // 4
    blocks = (trits.astype(np.uint8) + np.uint8(1)).reshape(4, quarter, -1)
    return (blocks[0] | blocks[1] << 2 | blocks[2] << 4 | blocks[3] << 6).ravel()


def t16_from_document(trits: np.ndarray) -> np.ndarray:
    rows, cols = trits.shape
    panels, tiles = -(-rows // 16), -(-cols // 16)
    padded = np.zeros((panels * 16, tiles * 16), np.int8)
    padded[:rows, :cols] = trits
    # [panel, row, tile, plane, column in plane] -> [panel, tile, row, column in plane] bytes of four planes
    codes = (padded + 1).astype(np.uint8).reshape(panels, 16, tiles, 4, 4).transpose(0, 2, 1, 4, 3)
    return (codes << (2 * np.arange(4, dtype=np.uint8))).sum(axis=-1, dtype=np.uint8).ravel()


def t20_tiles(codes: np.ndarray) -> np.ndarray:
    """Codes [rows, 5 planes, columns of a plane] as tiles of one segment: [panels, tiles * 64]."""
    rows, _, plane_cols = codes.shape
    padded = np.ones((-(-rows // 16) * 16, 5, plane_cols), np.uint8)
    padded[:rows] = codes
    values = (padded * np.array([1, 3, 9, 27, 81], np.uint8)[:, None]).sum(axis=1, dtype=np.uint8)
    # [panel, row, tile, column in tile] -> [panel, tile, row, column in tile]
    return values.reshape(-1, 16, plane_cols // 4, 4).transpose(0, 2, 1, 3).reshape(len(padded) // 16, -1)


def t20_from_document(trits: np.ndarray, group_size: int = 0) -> np.ndarray:
    rows, cols = trits.shape
    codes = (trits + 1).astype(np.uint8)
    if group_size == 0:
        plane_cols = 4 * -(-cols // 20)
        padded = np.ones((rows, 5 * plane_cols), np.uint8)
        padded[:, :cols] = codes
        return t20_tiles(padded.reshape(rows, 5, plane_cols)).ravel()
    whole = cols // group_size // 5 * 5 * group_size
    parts = [
        t20_tiles(codes[:, begin : begin + 5 * group_size].reshape(rows, 5, group_size))
        for begin in range(0, whole, 5 * group_size)
    ]
    if whole < cols:
        parts.append(t16_from_document(trits[:, whole:]).reshape(-(-rows // 16), -1))
    return np.concatenate(parts, axis=1).ravel()


DOCUMENTS = {"hf_packed": hf_packed_from_document, "t16": t16_from_document, "t20": t20_from_document}
ZEROS = {"hf_packed": 0x55, "t16": 0x55, "t20": 121}


@pytest.mark.parametrize("layout", DOCUMENTS)
@pytest.mark.parametrize(("rows", "cols"), [(4, 1), (8, 2), (16, 16), (20, 33), (100, 47)])
def test_bytes_are_those_of_the_document(layout: str, rows: int, cols: int) -> None:
    trits = np.random.default_rng(rows * cols).integers(-1, 2, (rows, cols)).astype(np.int8)
    data = formats.pack(trits, layout)
    np.testing.assert_array_equal(data, DOCUMENTS[layout](trits))
    assert data.size == formats.layout_bytes(layout, rows, cols)
    np.testing.assert_array_equal(formats.unpack(data, layout, rows, cols), trits)


def test_hf_packed_example_of_transformers() -> None:
    """The example in the docstring of transformers' unpack_weights."""
    data = np.array([0b10100001, 0b00011000, 0b10010000, 0b00001010], np.uint8)
    expected = [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]]
    np.testing.assert_array_equal(formats.unpack(data, "hf_packed", 8, 2), expected)


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("cols", [1, 64, 320, 321, 640, 1000, 1344])
def test_t20_bytes_with_groups(cols: int, group_size: int) -> None:
    trits = np.random.default_rng(cols).integers(-1, 2, (20, cols)).astype(np.int8)
    data = formats.pack(trits, "t20", group_size=group_size)
    np.testing.assert_array_equal(data, t20_from_document(trits, group_size))
    assert data.size == formats.layout_bytes("t20", 20, cols, group_size=group_size)
    np.testing.assert_array_equal(formats.unpack(data, "t20", 20, cols, group_size=group_size), trits)


def test_t20_takes_a_fifth_less() -> None:
    assert formats.layout_bytes("t20", 2560, 6912) == 2560 // 16 * 346 * 64
    assert formats.layout_bytes("t20", 2560, 2560, group_size=128) * 5 == formats.layout_bytes("t16", 2560, 2560) * 4


@pytest.mark.parametrize("layout", DOCUMENTS)
def test_bytes_of_zeros(layout: str) -> None:
    assert set(formats.pack(np.zeros((16, 16), np.int8), layout)) == {ZEROS[layout]}


@pytest.mark.parametrize("layout", DOCUMENTS)
def test_values_that_are_no_trits_are_refused(layout: str) -> None:
    trits = np.zeros((4, 5), np.int8)
    trits[2, 3] = 2
    with pytest.raises(ValueError, match="got 2 at row 2, column 3"):
        formats.pack(trits, layout)
    data = np.full(formats.layout_bytes(layout, 4, 5), 0xFF, np.uint8)
    with pytest.raises(FormatError, match="255" if layout == "t20" else "3"):
        formats.unpack(data, layout, 4, 5)


def test_rows_of_hf_packed_are_multiples_of_4() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 6 x 5"):
        formats.pack(np.zeros((6, 5), np.int8), "hf_packed")


@pytest.mark.parametrize(("rows", "cols"), [(4, 1), (20, 33), (36, 100), (260, 129)])
def test_repacking_keeps_every_trit_and_scale(rows: int, cols: int) -> None:
    trits = np.random.default_rng(7).integers(-1, 2, (rows, cols)).astype(np.int8)
    scales = np.random.default_rng(8).uniform(0.1, 1, rows).astype(np.float32)
    tensor = formats.PackedTensor(
        "hf_packed", rows, cols, formats.pack(trits, "hf_packed"), scale_kind="row", scales=scales
    )
    for threads in (1, 3):
        tiles = _core.kernels.repack(tensor, "t16", threads=threads)
        assert tiles.layout == "t16"
        np.testing.assert_array_equal(tiles.data, t16_from_document(trits))
        np.testing.assert_array_equal(tiles.effective_scales, scales)
        dense = _core.kernels.repack(tensor, "t20", threads=threads)
        assert dense.layout == "t20"
        np.testing.assert_array_equal(dense.data, t20_from_document(trits))
        np.testing.assert_array_equal(dense.effective_scales, scales)


@pytest.mark.parametrize("exact_in_half", [True, False])
@pytest.mark.parametrize("cols", [64, 400, 704])
def test_group_scales_survive_every_layout(cols: int, exact_in_half: bool) -> None:
    rows, groups = 36, -(-cols // 64)
    trits = np.random.default_rng(7).integers(-1, 2, (rows, cols)).astype(np.int8)
    scales = np.random.default_rng(8).uniform(0.1, 1, (rows, groups)).astype(np.float32)
    if exact_in_half:
        scales = scales.astype(np.float16).astype(np.float32)
    tensor = formats.PackedTensor(
        "hf_packed", rows, cols, formats.pack(trits, "hf_packed"), scale_kind="group", group_size=64, scales=scales
    )
    for layout in ("t16", "t20"):
        tiles = _core.kernels.repack(tensor, layout)
        np.testing.assert_array_equal(tiles.effective_scales, scales)
        np.testing.assert_array_equal(formats.unpack(tiles.data, layout, rows, cols, group_size=64), trits)


def test_repacking_refuses_code_3() -> None:
    tensor = formats.PackedTensor(
        "hf_packed", 4, 2, np.array([0x55, 0xD5], np.uint8), scale_kind="tensor", scales=np.ones(1, np.float32)
    )
    assert not formats.hf_packed_is_valid(tensor.data)
    with pytest.raises(FormatError, match="code is 3"):
        _core.kernels.repack(tensor, "t16")


def test_both_scale_conventions_give_the_same_weight() -> None:
    data = np.full(4, 0x55, np.uint8)
    for convention, stored in (("multiply", 0.25), ("divide", 4.0)):
        tensor = formats.PackedTensor(
            "hf_packed",
            4,
            4,
            data,
            scale_kind="tensor",
            convention=convention,
            scales=np.array([stored], np.float32),
        )
        np.testing.assert_array_equal(tensor.effective_scales, [0.25])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"scale_kind": "tensor", "scales": np.ones(2, np.float32)}, "expected 1 scales"),
        ({"scale_kind": "row", "scales": np.ones(3, np.float32)}, "expected 4 scales"),
        ({"scale_kind": "group", "group_size": 100, "scales": np.ones(4, np.float32)}, "multiple of 64, got 100"),
        ({"scale_kind": "tensor", "scales": np.array([np.nan], np.float32)}, "finite"),
        ({"scale_kind": "tensor", "scales": np.array([0], np.float32), "convention": "divide"}, "finite"),
        ({"scale_kind": "tensor", "scales": np.array([-1], np.float32)}, "not negative"),
        ({}, "codes need one"),
        ({"scale_kind": "block"}, "none, tensor, row or group"),
    ],
)
def test_scales_that_do_not_fit_are_refused(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        formats.PackedTensor("hf_packed", 4, 4, np.full(4, 0x55, np.uint8), **keywords)


def test_a_buffer_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 64 bytes, got 60"):
        formats.PackedTensor("f32", 4, 4, np.zeros(15, np.float32))
    with pytest.raises(ValueError, match=r"one of f32, f16, .*, not 'q4'"):
        formats.PackedTensor("q4", 4, 4, np.zeros(16, np.float32))


def test_a_tensor_keeps_its_buffer_alive() -> None:
    tensor = formats.PackedTensor("f32", 2, 2, memoryview(np.arange(4, dtype=np.float32)).cast("B"))
    np.testing.assert_array_equal(tensor.data.view(np.float32), [0, 1, 2, 3])
    view = tensor.data
    assert not view.flags.writeable
    del tensor
    np.testing.assert_array_equal(view.view(np.float32), [0, 1, 2, 3])


@pytest.mark.parametrize("size", [2**62, 2**63])
def test_sizes_that_overflow_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="too large"):
        formats.layout_bytes("f32", size, 4)
