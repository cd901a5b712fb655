# SPDX-License-Identifier: Apache-2.0
"""Mutated GGUF files and mutated tensor data: each is read, or refused with FormatError or ValueError.

`python tests/fuzz/fuzz_gguf.py SECONDS [SEED]` goes on for long; best with a build under AddressSanitizer.
"""

import random
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "io"))
from gguf_bytes import ARRAY, BOOL, F32, STRING, U16, U32, entry, gguf_file, tensor

from ternaryforge import _core

formats = _core.formats
LAYOUTS = ["tq1_0", "tq2_0", "q1_0", "q2_0", "pq2_0", "ptq1_0", "q2_k", "q4_0", "i2_s", "i2_s_64", "i2_s_rows4",
           "iq1_bn", "iq2_bn"]  # fmt: skip
DENSE = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_0", "Q2_K"]
NUMBERS = [0, 1, 2, 3, 7, 8, 31, 32, 33, 42, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**32, 2**60,
           2**62, 2**63 - 1, 2**63, 2**64 - 1]  # fmt: skip


def seeds() -> list[bytes]:
    """Small files that touch every branch of the reader."""
    values = [
        entry("general.architecture", STRING, "llama"),
        entry("general.alignment", U32, 64),
        entry("tokens", ARRAY, (STRING, ["<s>", "日本", ""])),
        entry("scores", ARRAY, (F32, [0.5, 1.0])),
        entry("flags", ARRAY, (BOOL, [0, 1])),
        entry("split.no", U16, 0),
        entry("split.count", U16, 1),
    ]
    plain = gguf_file(
        values, [tensor("a", (32, 2), 0, 0), tensor("b", (256, 2), 35, 256)], bytes(256 + 132), alignment=64
    )
    kinds = [(34, 256, 54), (35, 256, 66), (41, 256, 36), (42, 2048, 576), (36, 256, 96), (2, 256, 144),
             (10, 256, 84), (134, 256, 54), (135, 256, 68), (142, 256, 68)]  # fmt: skip
    infos, data = [], b""
    for number, (type_id, cols, size) in enumerate(kinds):
        infos.append(tensor(f"t{number}", (cols,), type_id, len(data)))
        data += bytes(size + -size % 32)
    return [plain, gguf_file([], infos, data), gguf_file()]


def mutate(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        kind = rng.randrange(6)
        at = rng.randrange(max(1, len(changed)))
        if kind == 0 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and changed:
            changed[at] = rng.choice(NUMBERS) & 0xFF
        elif kind == 2:
            number = rng.choice(NUMBERS)
            size = rng.choice([4, 8])
            changed[at : at + size] = struct.pack("<Q", number)[:size]
        elif kind == 3:
            del changed[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            begin = rng.randrange(max(1, len(changed)))
            changed[at:at] = changed[begin : begin + rng.randrange(1, 40)]
        else:
            del changed[at:]
    return bytes(changed)


def read_all(path: Path) -> bool:
    """Reads every value and every tensor; whether the file was accepted."""
    try:
        file = _core.io.GgufFile(path)
    except (_core.FormatError, FileNotFoundError):  # the second for a part of a split file
        return False
    assert set(file.metadata) == set(file.metadata_types)
    for found in file.tensors.values():
        assert 0 < found.data.size <= path.stat().st_size
        int(found.data[-1])
        cols = found.shape[-1]
        rows = int(np.prod(found.shape[:-1], dtype=object)) if len(found.shape) > 1 else 1
        layout = found.type_name.lower()
        try:
            if layout in LAYOUTS:
                formats.decode_ternary(layout, found.data, rows, cols)
            if found.type_name in DENSE:
                formats.dequantize(found.type_name, found.data, rows, cols)
        except _core.FormatError:
            pass
    return True


def decode_random(rng: random.Random) -> None:
    """Any bytes of the right size decode to trits or are refused, and trits encode again."""
    layout = rng.choice(LAYOUTS)
    rows, cols = 4 * rng.randrange(1, 3), 256 * rng.randrange(1, 3)
    data = np.frombuffer(rng.randbytes(formats.layout_bytes(layout, rows, cols)), np.uint8)
    try:
        trits, scales = formats.decode_ternary(layout, data, rows, cols, threads=rng.randrange(1, 3))
    except _core.FormatError:
        return
    assert np.abs(trits).max() <= 1
    assert np.isfinite(scales).all()
    assert (scales >= 0).all()
    if layout in {"i2_s_rows4", "q2_k", "q4_0"}:  # only read, or written in one of several forms
        return
    again = formats.encode_ternary(layout, trits, scales)
    decoded = formats.decode_ternary(layout, again, rows, cols)
    np.testing.assert_array_equal(decoded[1], scales)
    if layout != "q1_0":  # which has no 0 for weights whose scale is 0
        np.testing.assert_array_equal(decoded[0], trits)


def run(folder: Path, rounds: int, seed: int) -> int:
    """The number of mutated files that were accepted."""
    rng = random.Random(seed)
    files, accepted = seeds(), 0
    path = folder / "mutated-00001-of-00002.gguf"
    for _ in range(rounds):
        path.write_bytes(mutate(rng.choice(files), rng))
        accepted += read_all(path)
        decode_random(rng)
    return accepted


def main() -> None:
    end = time.monotonic() + float(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    rounds = accepted = 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            accepted += run(Path(folder), 1000, seed)
            rounds, seed = rounds + 1000, seed + 1
    sys.stdout.write(f"{rounds} files, {accepted} accepted, last seed {seed - 1}\n")


if __name__ == "__main__":
    main()
