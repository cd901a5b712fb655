# SPDX-License-Identifier: Apache-2.0
"""Layouts of other engines' files: golden vectors, NumPy codecs, the package gguf, refusals."""

import hashlib

import gguf
import numpy as np
import pytest
from file_layouts import PACKERS

from ternaryforge import _core
from ternaryforge._core import FormatError

formats = _core.formats
GGUF_TERNARY = {"tq1_0": gguf.GGMLQuantizationType.TQ1_0, "tq2_0": gguf.GGMLQuantizationType.TQ2_0}


def half(value: float) -> np.float32:
    return np.float32(np.float16(value))


def trits_for(layout: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    trits = np.random.default_rng(seed).integers(-1, 2, (rows, cols)).astype(np.int8)
    return np.where(trits == 0, 1, trits).astype(np.int8) if layout == "q1_0" else trits


def scales_for(layout: str, rows: int, cols: int) -> np.ndarray:
    """Distinct f16-exact scales of the kind that the layout has: [1, 1], [rows, 1] or [rows, blocks]."""
    unit = PACKERS[layout][1]
    shape = (1, 1) if unit < 0 else (rows, 1 if unit == 0 else cols // unit)
    return np.float16(np.linspace(0.01, 2, shape[0] * shape[1])).astype(np.float32).reshape(shape)


# M = 2, K = 512, v(e) = ((e * e + 3 e + e div 5) mod 3) - 1. The files of these packers ran in the engines.
INDEX = np.arange(1024)
GOLDEN_TRITS = ((INDEX * INDEX + 3 * INDEX + INDEX // 5) % 3 - 1).astype(np.int8).reshape(2, 512)
GOLDEN = [
    ("tq2_0", 1.0, 264, "7074f7ab027dbece", "54a19568251a890622014840", "01484012003c"),
    ("tq1_0", 1.0, 216, "277994a839c3790f", "2c70825087ee95c8bf573d05", "39a5cb56003c"),
    ("q2_0", 1.0, 288, "18483c53cae8a9fc", "003c1499060245a681409169", "2050641a0814"),
    ("tq2_0", half(0.05), 264, "db591d8fc7999e9d", "54a19568251a890622014840", "01484012662a"),
    ("q2_0", half(0.05), 288, "7f5732569de9c8f1", "662a1499060245a681409169", "2050641a0814"),
    ("q2_k", half(0.05), 336, "55cdaca5c587e80c", "1" * 24, "4012662a662a"),
    ("q4_0", half(0.05), 576, "e858dff7a088e868", "662a87887887988998998978", "797777878878"),
    ("i2_s", np.float32(0.05), 288, "2d641cf16b69eded", "154a562958a4629088402101", "000000000000"),
    ("iq2_bn", np.float32(0.05), 264, "ef4cbdeaae1d8f90", "cdcc4c3d1445916499a6691a", "200802405014"),
    ("iq1_bn", half(0.05), 212, "18007d096ec3829c", "662a62a713cc3707991258de", "1258deb0720d"),
]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden[0])
def test_golden_vectors(golden: tuple[str, float, int, str, str, str]) -> None:
    layout, scale, size, digest, first, last = golden
    assert [np.count_nonzero(v == GOLDEN_TRITS) for v in (-1, 0, 1)] == [410, 342, 272]
    data = formats.encode_ternary(layout, GOLDEN_TRITS, np.array([scale], np.float32))
    assert data.size == size == formats.layout_bytes(layout, 2, 512)
    assert data[:12].tobytes().hex() == first
    assert data[-6:].tobytes().hex() == last
    assert hashlib.sha256(data.tobytes()).hexdigest()[:16] == digest
    trits, scales = formats.decode_ternary(layout, data, 2, 512)
    np.testing.assert_array_equal(trits, GOLDEN_TRITS)
    assert set(scales.ravel()) == {scale}


@pytest.mark.parametrize("layout", PACKERS)
@pytest.mark.parametrize(("rows", "cols"), [(4, 256), (20, 768), (36, 2560)])
def test_bytes_are_those_of_the_document(layout: str, rows: int, cols: int) -> None:
    trits, scales = trits_for(layout, rows, cols), scales_for(layout, rows, cols)
    packer, unit = PACKERS[layout]
    expected = packer(trits, scales[0, 0] if unit < 0 else scales)
    decoded, decoded_scales = formats.decode_ternary(layout, expected, rows, cols, threads=3)
    np.testing.assert_array_equal(decoded, trits)
    np.testing.assert_array_equal(decoded_scales, scales)
    assert formats.layout_bytes(layout, rows, cols) == expected.size
    if layout != "i2_s_rows4":
        for threads in (1, 3):
            np.testing.assert_array_equal(formats.encode_ternary(layout, trits, scales, threads=threads), expected)


@pytest.mark.parametrize("layout", GGUF_TERNARY)
def test_ternary_bytes_are_those_of_gguf(layout: str) -> None:
    trits = trits_for(layout, 8, 1024)
    scales = scales_for(layout, 8, 1024)
    data = gguf.quants.quantize(trits * np.repeat(scales, 256, axis=1), GGUF_TERNARY[layout])
    np.testing.assert_array_equal(formats.encode_ternary(layout, trits, scales), data.ravel())
    values = gguf.quants.dequantize(data, GGUF_TERNARY[layout])
    decoded, decoded_scales = formats.decode_ternary(layout, data.ravel(), 8, 1024)
    np.testing.assert_array_equal(decoded * np.repeat(decoded_scales, 256, axis=1), values)


@pytest.mark.parametrize("cols", [96, 320])
def test_i2_s_runs_over_the_rows_without_a_break(cols: int) -> None:
    trits = trits_for("i2_s", 8, cols)
    data = PACKERS["i2_s"][0](trits, 0.5)
    np.testing.assert_array_equal(formats.decode_ternary("i2_s", data, 8, cols)[0], trits)
    with pytest.raises(ValueError, match=f"multiple of 128, got 8 x {cols}"):
        formats.encode_ternary("i2_s", trits, np.ones(1, np.float32))


def test_a_negative_scale_turns_the_trits_and_a_zero_clears_them() -> None:
    trits = trits_for("tq2_0", 1, 512)
    data = PACKERS["tq2_0"][0](trits, np.array([[-0.5, 0.0]], np.float32))
    decoded, scales = formats.decode_ternary("tq2_0", data, 1, 512)
    np.testing.assert_array_equal(scales, [[0.5, 0]])
    np.testing.assert_array_equal(decoded[0, :256], -trits[0, :256])
    assert not decoded[0, 256:].any()


@pytest.mark.parametrize("layout", ["tq2_0", "q2_0", "pq2_0", "i2_s", "i2_s_64", "i2_s_rows4", "iq2_bn"])
def test_code_3_is_refused(layout: str) -> None:
    data = PACKERS[layout][0](np.zeros((4, 512), np.int8), 1.0)
    data[formats.layout_bytes(layout, 4, 512) // 2 + 8] |= 0xFF
    with pytest.raises(FormatError, match=rf"\[{layout}\] no trit at row \d, column \d+: code 3"):
        formats.decode_ternary(layout, data, 4, 512)


@pytest.mark.parametrize("layout", sorted(set(PACKERS) - {"q4_0"}))
def test_scales_that_are_no_numbers_are_refused(layout: str) -> None:
    unit = PACKERS[layout][1]
    for value in (np.nan, np.inf):
        data = PACKERS[layout][0](trits_for(layout, 4, 256), np.float32(value))
        with pytest.raises(FormatError, match="the scale of row 0, column 0 is"):
            formats.decode_ternary(layout, data, 4, 256)
    assert unit >= -1


def test_dense_q4_0_and_q2_k_are_no_ternary() -> None:
    values = np.random.default_rng(1).normal(size=(2, 256)).astype(np.float32)
    with pytest.raises(FormatError, match=r"row 0, column \d+: the weights of its block are not -s, 0 and \+s"):
        formats.decode_ternary("q4_0", formats.quantize("Q4_0", values), 2, 256)
    block = np.random.default_rng(2).integers(0, 256, 84).astype(np.uint8)
    block[80:] = np.array([0.5, 0.25], np.float16).view(np.uint8)
    with pytest.raises(FormatError, match=r"the weights of its block are not -s, 0 and \+s"):
        formats.decode_ternary("q2_k", block, 1, 256)


def test_other_forms_of_ternary_q4_0_and_q2_k() -> None:
    """Levels +-8 d with a negative d, as llama.cpp rounds a one-sided block; a = 3, b = 3 with a third of the scale."""
    values = np.zeros((1, 32), np.float32)
    values[0, ::3] = 0.75
    trits, scales = formats.decode_ternary("q4_0", formats.quantize("Q4_0", values), 1, 32)
    np.testing.assert_array_equal(trits * scales, values)
    trits = trits_for("q2_k", 1, 256)
    data = PACKERS["q2_k"][0](trits, 0.25)
    data[:16] = 0x33
    decoded, scales = formats.decode_ternary("q2_k", data, 1, 256)
    np.testing.assert_array_equal(decoded, trits)
    assert scales == [[0.75]]


def test_equal_scales_go_into_smaller_blocks_and_different_ones_do_not() -> None:
    """Groups of 128 into blocks of 64 and 32, not into 256."""
    trits = trits_for("q2_0", 3, 512)
    scales = np.float16(np.linspace(0.1, 1, 12)).astype(np.float32).reshape(3, 4)
    for layout, repeat in (("q2_0", 2), ("q4_0", 4), ("pq2_0", 1)):
        data = formats.encode_ternary(layout, trits, scales)
        decoded, stored = formats.decode_ternary(layout, data, 3, 512)
        np.testing.assert_array_equal(stored, np.repeat(scales, repeat, axis=1))
        np.testing.assert_array_equal(decoded, trits)
        assert formats.collapse_scales(stored, 512, 128 // repeat)[:2] == ("group", 128)
    for layout in ("tq2_0", "tq1_0", "q2_k"):
        with pytest.raises(ValueError, match="columns 0 to 255 of row 0 share one scale"):
            formats.encode_ternary(layout, trits, scales)
    with pytest.raises(ValueError, match="columns 0 to 511 of row 0 share one scale"):
        formats.encode_ternary("iq2_bn", trits, scales)
    with pytest.raises(ValueError, match="the matrix shares one scale"):
        formats.encode_ternary("i2_s", trits, scales[:, 0].copy())


def test_a_scale_that_f16_does_not_hold_is_refused() -> None:
    trits = trits_for("tq2_0", 2, 256)
    for layout in ("tq2_0", "tq1_0", "q2_0", "q4_0", "q2_k", "iq1_bn", "pq2_0", "ptq1_0"):
        with pytest.raises(ValueError, match=r"f16 does not hold the scale 0\.05"):
            formats.encode_ternary(layout, trits, np.array([0.05], np.float32))
    for layout in ("i2_s", "iq2_bn"):
        formats.encode_ternary(layout, trits, np.array([0.05], np.float32))


def test_zero_scales_fit_every_block() -> None:
    trits = trits_for("tq2_0", 2, 512)
    scales = np.array([[0.5, 0, 0.5, 0.5], [0, 0, 0, 0]], np.float32)
    data = formats.encode_ternary("tq2_0", trits, scales)
    decoded, stored = formats.decode_ternary("tq2_0", data, 2, 512)
    np.testing.assert_array_equal(stored, [[0.5, 0.5], [0, 0]])
    np.testing.assert_array_equal(decoded, trits * (np.repeat(scales, 128, axis=1) != 0))
    kind, group_size, collapsed = formats.collapse_scales(stored, 512, 256)
    assert (kind, group_size, collapsed.tolist()) == ("tensor", 0, [0.5])


def test_what_is_no_trit_or_does_not_fit_is_refused() -> None:
    one = np.ones(1, np.float32)
    trits = trits_for("tq2_0", 2, 256)
    trits[1, 7] = 2
    with pytest.raises(ValueError, match="got 2 at row 1, column 7"):
        formats.encode_ternary("tq2_0", trits, one)
    with pytest.raises(ValueError, match="no 0, got one in row 0"):
        formats.encode_ternary("q1_0", np.zeros((1, 128), np.int8), one)
    with pytest.raises(ValueError, match=r"multiple of 256, got 2 x 128"):
        formats.encode_ternary("tq1_0", np.zeros((2, 128), np.int8), one)
    with pytest.raises(ValueError, match="takes 132 bytes, got 131"):
        formats.decode_ternary("tq2_0", np.zeros(131, np.uint8), 2, 256)
    with pytest.raises(ValueError, match="keeps its scales elsewhere"):
        formats.decode_ternary("hf_packed", np.zeros(256, np.uint8), 4, 256)
    with pytest.raises(ValueError, match="only read"):
        formats.encode_ternary("i2_s_rows4", np.zeros((4, 4), np.int8), one)
    with pytest.raises(ValueError, match="finite and not negative"):
        formats.encode_ternary("tq2_0", np.zeros((2, 256), np.int8), -one)


@pytest.mark.parametrize("layout", PACKERS)
def test_repacking_gives_tiles_with_the_same_weights(layout: str) -> None:
    rows, cols = 36, 768
    trits, scales = trits_for(layout, rows, cols), scales_for(layout, rows, cols)
    unit = PACKERS[layout][1]
    if layout == "q4_0":
        scales = np.repeat(scales[:, ::2], 2, axis=1)
    data = PACKERS[layout][0](trits, scales[0, 0] if unit < 0 else scales)
    tensor = formats.PackedTensor(layout, rows, cols, data)
    for threads in (1, 3):
        tiles = _core.kernels.repack(tensor, "t16", threads=threads)
        np.testing.assert_array_equal(formats.unpack(tiles.data, "t16", rows, cols), trits)
        expected = np.broadcast_to(np.repeat(scales, cols // scales.shape[1], axis=1), (rows, cols))
        stored = tiles.effective_scales
        assert tiles.scale_kind == {-1: "tensor", 0: "row"}.get(unit, "group")
        if tiles.scale_kind == "group":
            stored = np.repeat(stored, tiles.group_size, axis=1)
        np.testing.assert_array_equal(
            np.broadcast_to(stored.reshape(-1, 1) if stored.ndim == 1 else stored, (rows, cols)), expected
        )


def test_repacking_collapses_equal_scales_and_applies_the_tensor_factor() -> None:
    trits = trits_for("tq2_0", 20, 512)
    data = formats.encode_ternary("tq2_0", trits, np.ones(1, np.float32))
    tensor = formats.PackedTensor("tq2_0", 20, 512, data, scale_kind="tensor", scales=np.array([0.05], np.float32))
    tiles = _core.kernels.repack(tensor, "t16")
    assert tiles.scale_kind == "tensor"
    np.testing.assert_array_equal(tiles.effective_scales, np.array([0.05], np.float32))
    np.testing.assert_array_equal(formats.unpack(tiles.data, "t16", 20, 512), trits)
    rows = np.float16(np.linspace(0.1, 1, 20)).astype(np.float32)
    tiles = _core.kernels.repack(
        formats.PackedTensor("q4_0", 20, 512, formats.encode_ternary("q4_0", trits, rows)), "t16"
    )
    assert tiles.scale_kind == "row"
    np.testing.assert_array_equal(tiles.effective_scales, rows)
    with pytest.raises(ValueError, match="only one factor for the whole tensor"):
        formats.PackedTensor("tq2_0", 20, 512, data, scale_kind="row", scales=rows)


def test_repacking_refuses_small_groups_and_what_is_not_ternary() -> None:
    trits = trits_for("q4_0", 4, 64)
    scales = np.array([[1, 2]] * 4, np.float32)
    tensor = formats.PackedTensor("q4_0", 4, 64, formats.encode_ternary("q4_0", trits, scales))
    with pytest.raises(ValueError, match="q4_0 has one scale per 32 columns and neighbours differ"):
        _core.kernels.repack(tensor, "t16")
    tensor = formats.PackedTensor("tq2_0", 4, 256, np.full(264, 0x3F, np.uint8))
    with pytest.raises(FormatError, match="no trit at row 0, column 0"):
        _core.kernels.repack(tensor, "t16", threads=3)
