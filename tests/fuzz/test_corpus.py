# SPDX-License-Identifier: Apache-2.0
"""The corpora of the libFuzzer targets, findings among them, through the Python readers."""

import struct
import zlib
from pathlib import Path

import fuzz_gguf

import ternaryforge as tf
from ternaryforge.onebit import read_onebit

CORPUS = Path(__file__).parent / "corpus"


def test_gguf_files_are_read_or_refused(tmp_path: Path) -> None:
    """As in gguf_reader_fuzzer.cc: a second "GGUF" begins the second part of a split file."""
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    read = 0
    files = sorted((CORPUS / "gguf_reader").iterdir())
    for path in files:
        data = path.read_bytes()
        middle = data.find(b"GGUF", 1)
        first.write_bytes(data if middle < 0 else data[:middle])
        second.unlink(missing_ok=True)
        if middle > 0:
            second.write_bytes(data[middle:])
        read += fuzz_gguf.read_all(first)
    assert 10 < read < len(files) - 10


def test_onebit_files_are_read_or_refused(tmp_path: Path) -> None:
    """As in onebit_decoder_fuzzer.cc: size and checksum are put right first."""
    path = tmp_path / "model.1bit"
    read, refused, files = 0, 0, sorted((CORPUS / "onebit_decoder").iterdir())
    for seed in files:
        data = bytearray(seed.read_bytes())
        if len(data) >= 64:
            struct.pack_into("<II", data, 8, len(data), zlib.crc32(data[16:]))
        path.write_bytes(data)
        try:
            read_onebit(path)
            read += 1
        except tf.FormatError as error:
            refused += str(path) in str(error)
    assert read + refused == len(files), "every refusal names the file"
    assert 5 < read < len(files) - 5
