# SPDX-License-Identifier: Apache-2.0
"""GGUF files with one thing wrong each: every one is refused by name."""

import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "io"))
from gguf_bytes import ARRAY, BOOL, F32, STRING, U16, U32, U64, entry, gguf_file, string, tensor

from ternaryforge import _core

HUGE = 2**64 - 1
T = tensor("t", (32,), 24, 0)  # I8, 32 bytes


def parts(**wrong: int) -> bytes:
    """The first of two parts."""
    fields = {"split.no": 0, "split.count": 2, "split.tensors.count": 2, **wrong}
    return gguf_file([entry(key, U16, number) for key, number in fields.items()], [T], bytes(32))


CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the magic number takes 4 bytes at byte 0, and the file ends after 0"),
    "another format": (b"ggjt" + bytes(40), "not 'GGUF'"),
    "version 1": (gguf_file(version=1), "version 1 is not known"),
    "version 4": (gguf_file(version=4), "version 4 is not known"),
    "big-endian": (gguf_file(version=3 << 24), "big-endian"),
    "too many tensors": (gguf_file(counts=(HUGE, 0)), f"counts {HUGE} tensors"),
    "too many keys": (gguf_file(counts=(0, 2**40)), f"{2**40} keys"),
    "fewer tensors than counted": (gguf_file([], [T], counts=(2, 0)), "more than|cut off"),
    "key length": (gguf_file([struct.pack("<Q", HUGE) + bytes(64)], counts=(0, 1)), f"a key takes {HUGE} bytes"),
    "key length, signed": (gguf_file([struct.pack("<q", -1) + bytes(64)], counts=(0, 1)), "a key takes"),
    "empty key": (gguf_file([entry("", U32, 1)]), "a key at byte .* is empty"),
    "key with a zero": (gguf_file([entry("a\0b", U32, 1)]), "zero byte"),
    "key that is no UTF-8": (gguf_file([entry(b"a\xff", U32, 1)]), "a key at byte 32 is no UTF-8"),
    "key for the terminal": (
        gguf_file([string("a\x1b[2J\n\x7f") + struct.pack("<II", 99, 0)]),
        r"key 'a\\x1b\[2J\\x0a\\x7f' has the value type 99",
    ),
    "endless key": (gguf_file([string("ä" * 30000) + struct.pack("<II", 99, 0)]), r"key 'ä{497}\.\.\.$"),
    "duplicate key": (gguf_file([entry("a", U32, 1), entry("a", F32, 1)]), "the key 'a' is there twice"),
    "duplicate key after many": (
        gguf_file([entry(f"k{i}", U32, 1) for i in [*range(40), 3]]),
        "the key 'k3' is there twice",
    ),
    "value type": (gguf_file([string("a") + struct.pack("<II", 13, 0)]), "key 'a' has the value type 13"),
    "bool": (gguf_file([entry("a", BOOL, 2)]), "the value of key 'a' is a bool that is neither"),
    "bool in an array": (gguf_file([entry("a", ARRAY, (BOOL, [0, 1, 7]))]), "the value of key 'a' is a bool"),
    "string length": (
        gguf_file([string("a") + struct.pack("<IQ", STRING, 2**63) + bytes(32)]),
        f"the value of key 'a' takes {2**63} bytes",
    ),
    "overlong UTF-8": (gguf_file([entry("a", STRING, b"\xc0\x80")]), "the value of key 'a' at byte 45 is no UTF-8"),
    "surrogate": (gguf_file([entry("a", STRING, b"\xed\xa0\x80")]), "no UTF-8"),
    "beyond Unicode": (gguf_file([entry("a", STRING, b"\xf4\x90\x80\x80")]), "no UTF-8"),
    "cut UTF-8": (gguf_file([entry("a", STRING, b"x\xe6\x97")]), "no UTF-8"),
    "no UTF-8 in an array": (gguf_file([entry("a", ARRAY, (STRING, [b"ok", b"\xfe"]))]), "key 'a' .*no UTF-8"),
    "array length": (
        gguf_file([string("a") + struct.pack("<IIQ", ARRAY, U32, 2**62) + bytes(32)]),
        f"key 'a' has {2**62} elements",
    ),
    "array of strings length": (
        gguf_file([string("a") + struct.pack("<IIQ", ARRAY, STRING, 2**61) + bytes(32)]),
        f"key 'a' has {2**61} strings",
    ),
    "nested array": (
        gguf_file([string("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(32)]),
        "key 'a' is an array of arrays",
    ),
    "alignment 0": (gguf_file([entry("general.alignment", U32, 0)]), "power of two, got 0"),
    "alignment 24": (gguf_file([entry("general.alignment", U32, 24)]), "power of two, got 24"),
    "huge alignment": (gguf_file([entry("general.alignment", U64, 2**63)]), "power of two, got"),
    "alignment as text": (gguf_file([entry("general.alignment", STRING, "32")]), "must be an integer, got string"),
    "tensor name length": (gguf_file([], [struct.pack("<Q", HUGE) + bytes(64)], counts=(1, 0)), "name of a tensor"),
    "empty tensor name": (gguf_file([], [tensor("", (32,), 24, 0)], bytes(32)), "name of a tensor at byte .* is empty"),
    "duplicate tensor": (
        gguf_file([], [T, tensor("t", (32,), 24, 32)], bytes(64)),
        "the tensor 't' is there twice",
    ),
    "no dimensions": (gguf_file([], [tensor("t", (), 24, 0)], bytes(64)), "'t' has 0 dimensions"),
    "five dimensions": (gguf_file([], [tensor("t", (1,) * 5, 24, 0)], bytes(32)), "'t' has 5 dimensions"),
    "2^32 dimensions": (gguf_file([], [string("t") + b"\xff" * 4 + bytes(64)]), "'t' has 4294967295 dimensions"),
    "zero dimension": (gguf_file([], [tensor("t", (32, 0), 24, 0)], bytes(32)), "'t' has a dimension of 0"),
    "dimension overflow": (
        gguf_file([], [tensor("t", (2**32, 2**32, 2**32, 2), 24, 0)], bytes(32)),
        "'t' has a dimension of 4294967296, which is zero or too large",
    ),
    "negative dimension": (gguf_file([], [tensor("t", (HUGE,), 24, 0)], bytes(32)), "zero or too large"),
    "unknown type": (gguf_file([], [tensor("t", (32,), 999, 0)], bytes(32)), "'t' has the type number 999, which no"),
    "removed type": (gguf_file([], [tensor("t", (32,), 31, 0)], bytes(32)), "type number 31, Q4_0_4_4.* removed"),
    "I8_S": (gguf_file([], [tensor("t", (32,), 37, 0)], bytes(32)), "type number 37, I8_S of bitnet.cpp"),
    "interleaved rows": (gguf_file([], [tensor("t", (64, 4), 335, 0)], bytes(320)), "IQ2_BN_R4 of ik_llama.cpp"),
    "columns": (gguf_file([], [tensor("t", (255,), 35, 0)], bytes(96)), "255 columns cannot be TQ2_0, .*blocks of 256"),
    "weights of I2_S": (gguf_file([], [tensor("t", (32,), 36, 0)], bytes(64)), "32 columns cannot be I2_S, .*of 128"),
    "offset off the alignment": (
        gguf_file([], [tensor("t", (32,), 24, 8)], bytes(64)),
        "'t' begins at offset 8, which is no multiple of the alignment 32",
    ),
    "offset after the end": (gguf_file([], [tensor("t", (32,), 24, 2**40)], bytes(32)), "'t' begins at offset"),
    "offset overflow": (gguf_file([], [tensor("t", (32,), 24, 2**64 - 32)], bytes(32)), "'t' begins at offset"),
    "offsets out of order": (
        gguf_file([], [T, tensor("u", (32,), 24, 64), tensor("v", (32,), 24, 32)], bytes(96)),
        "'v' begins at offset 32, not after the tensor 'u'",
    ),
    "overlap": (
        gguf_file([], [tensor("t", (64,), 24, 0), tensor("u", (32,), 24, 32)], bytes(64)),
        r"'t' \(I8\) takes 64 bytes and has 32 before",
    ),
    "first tensor not at the front": (
        gguf_file([], [tensor("t", (32,), 24, 32)], bytes(64)),
        "'t' begins at offset 32, the first one begins at 0",
    ),
    "gap": (
        gguf_file([], [T, tensor("u", (32,), 24, 64)], bytes(96)),
        r"'t' \(I8 of llama.cpp\) leaves 32 bytes unused: the file is damaged or of an unknown engine",
    ),
    "id 36 of older llama.cpp files": (  # 18 bytes for 32 columns
        gguf_file([], [tensor("t", (256, 4), 36, 0)], bytes(4 * 144)),
        r"'t' \(I2_S of bitnet.cpp\) leaves 288 bytes unused: it may be IQ4_NL_4_4",
    ),
    "cut data": (gguf_file([], [T], bytes(31)), r"'t' \(I8\) takes 32 bytes and has 31"),
    "no data": (gguf_file([], [T]), "cut off or is damaged"),
    "id 42 of no known size": (
        gguf_file([], [tensor("t", (256, 64), 42, 0)], bytes(9000)),
        "'t' has the type number 42, and its 9000 bytes for 64 x 256 fit none of Q2_0, PQ2_0, TL2, STQ1_0",
    ),
    "id 42 twice with other sizes": (
        gguf_file([], [tensor("t", (256, 64), 42, 0), tensor("u", (256, 64), 42, 4608)], bytes(4608 + 4352)),
        "'u' has the type number 42, .* fit none of Q2_0",
    ),
    "not the first part": (parts(**{"split.no": 1}), "this is part 2 of 2: open the first part"),
    "part without its name": (parts(), "ends in -00001-of-2"),
    "negative part": (
        gguf_file([string("split.no") + struct.pack("<Ih", 3, -1)]),
        "the key 'split.no' must not be negative",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    content, message = CASES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(_core.FormatError, match=message) as caught:
        _core.io.GgufFile(path)
    assert str(caught.value).startswith(f"[gguf] {path}: ")


WHOLE = gguf_file(
    [entry("general.architecture", STRING, "llama"), entry("a", ARRAY, (STRING, ["x", "yz"])), entry("b", U16, 7)],
    [T, tensor("u", (256, 2), 35, 32)],
    bytes(32 + 132),
)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(WHOLE)
    _core.io.GgufFile(path)
    for size in range(len(WHOLE)):
        path.write_bytes(WHOLE[:size])
        with pytest.raises(_core.FormatError, match=r"cut off|more than .* bytes can hold|than the file holds"):
            _core.io.GgufFile(path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"split.no": 0}, "expected part 2 of 2, got part 1 of 2"),
        ({"split.count": 3}, "expected part 2 of 2, got part 2 of 3"),
        ({}, "the tensor 't' is there twice"),
    ],
)
def test_parts_that_do_not_fit(second: dict[str, int], message: str, tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(parts())
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(parts(**{"split.no": 1, **second}))
    with pytest.raises(_core.FormatError, match=f"00002-of-00002.gguf: {message}"):
        _core.io.GgufFile(tmp_path / "m-00001-of-00002.gguf")


def test_a_wrong_count_of_all_tensors(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(parts(**{"split.tensors.count": 5}))
    second = gguf_file(
        [entry("split.no", U16, 1), entry("split.count", U16, 2)], [tensor("u", (32,), 24, 0)], bytes(32)
    )
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(second)
    with pytest.raises(_core.FormatError, match=r"hold 2 tensors, split\.tensors.count says 5"):
        _core.io.GgufFile(tmp_path / "m-00001-of-00002.gguf")
