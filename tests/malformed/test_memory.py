# SPDX-License-Identifier: Apache-2.0
"""Headers that count more than they hold take no memory for it."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "io"))
from gguf_bytes import ARRAY, STRING, U8, entry, gguf_file, string

# The mapping of the file fits into the limit, a table of what the header counts does not.
OPEN = """
import resource, sys
from ternaryforge import _core
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 1280 * 2**20,) * 2)
try:
    _core.io.GgufFile(sys.argv[1])
except _core.FormatError as error:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(error, "|", peak.split()[1])
"""
SIZE = 2**30


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of the address space is that of Linux")
@pytest.mark.parametrize(
    ("header", "message"),
    [
        (gguf_file(counts=((SIZE - 24) // 33, 0)), "the name of a tensor at byte 32 is empty"),
        (gguf_file(counts=(0, (SIZE - 24) // 14)), "a key at byte 32 is empty"),
        (
            gguf_file([string("a") + entry("", ARRAY, (STRING, []))[8:16] + (2**27).to_bytes(8, "little")]),
            "has 134217728 strings, more than the file holds",
        ),
        (
            gguf_file([string("a") + entry("", ARRAY, (U8, []))[8:16] + SIZE.to_bytes(8, "little")]),
            "has 1073741824 elements, more than the file holds",
        ),
    ],
    ids=["tensors", "keys", "strings", "bytes"],
)
def test_counts_take_no_memory(header: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(SIZE)
    done = subprocess.run([sys.executable, "-c", OPEN, path], check=True, capture_output=True, text=True)
    error, peak = done.stdout.rsplit("|", 1)
    assert message in error
    assert int(peak) < 300 * 1024, "kilobytes, most of them Python and NumPy"
