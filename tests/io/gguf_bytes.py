# SPDX-License-Identifier: Apache-2.0
"""GGUF files put together byte by byte, so that every field can be wrong."""

import struct
from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: object) -> bytes:
    """One value without its key: type, then content; an array is given as (element type, sequence)."""
    if kind == ARRAY:
        element, items = content  # type: ignore[misc]
        return struct.pack("<IIQ", ARRAY, element, len(items)) + b"".join(value(element, i)[4:] for i in items)
    body = string(content) if kind == STRING else struct.pack("<" + CODES[kind], content)  # type: ignore[arg-type]
    return struct.pack("<I", kind) + body


def entry(key: str | bytes, kind: int, content: object) -> bytes:
    return string(key) + value(kind, content)


def tensor(name: str | bytes, dimensions: Sequence[int], type_id: int, offset: int) -> bytes:
    """`dimensions` as in the file: columns first."""
    packed = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return string(name) + packed + struct.pack("<IQ", type_id, offset)


def gguf_file(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    header = magic + struct.pack("<IQQ", version, tensor_count, entry_count) + b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data
