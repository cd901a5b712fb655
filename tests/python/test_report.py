# SPDX-License-Identifier: Apache-2.0
"""Reports as dicts, files and HTML; the memory meter."""

import json
import mmap
import time
from dataclasses import dataclass
from pathlib import Path

from ternaryforge.memory import PeakAnonymous, anonymous_bytes
from ternaryforge.report import Report


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    error: float


@dataclass(frozen=True, slots=True)
class Sample(Report):
    title: str
    count: int
    parts: tuple[Part, ...]


SAMPLE = Sample("<b>ä</b>", 3, (Part("a&b", 0.123456789), Part("c", 2.0)))


def test_report_becomes_json_and_html(tmp_path: Path) -> None:
    parts = [{"name": "a&b", "error": 0.123456789}, {"name": "c", "error": 2.0}]
    SAMPLE.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved == {"title": "<b>ä</b>", "count": 3, "parts": parts}
    page = SAMPLE._repr_html_()
    assert "&lt;b&gt;ä&lt;/b&gt;" in page
    assert "a&amp;b" in page
    assert "<b>" not in page


def test_peak_memory_is_seen_after_it_is_gone() -> None:
    size = 64 << 20
    assert anonymous_bytes() is not None
    with PeakAnonymous() as memory:
        # Straight from the kernel: an allocator may hand out pages that an earlier test has already made resident.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        deadline = time.monotonic() + 30
        while (memory.growth or 0) < 60e6 and time.monotonic() < deadline:
            time.sleep(0.01)  # the watching thread may have to wait for a core
        block.close()
    assert memory.growth is not None
    assert 60e6 < memory.growth < 90e6
    with PeakAnonymous() as memory:
        pass
    assert memory.growth is not None
    assert memory.growth < 10e6
