# SPDX-License-Identifier: Apache-2.0
"""How much memory this process holds, as the kernel counts it."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_INTERVAL = 0.005  # seconds between two looks; one costs about 30 microseconds


def peak_resident_bytes() -> int | None:
    """The most memory that this process ever had, mapped files included; None where it cannot be read."""
    return _read("VmHWM:")


def anonymous_bytes() -> int | None:
    """Memory that no file backs (heap, arrays, stacks; not mapped weights), None outside of Linux."""
    return _read("RssAnon:")


def _read(name: str) -> int | None:
    try:
        status = _STATUS.read_text(encoding="ascii")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


class PeakAnonymous:
    """Watches the anonymous memory of this process in a `with` block.

    `growth` is the highest value seen above the one at the start; None where it cannot be read.
    """

    def __init__(self) -> None:
        self.growth: int | None = None
        self._start = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        start = anonymous_bytes()
        if start is not None:
            self._start, self.growth = start, 0
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.growth is not None:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        while True:
            now = anonymous_bytes()
            if now is not None and self.growth is not None:
                self.growth = max(self.growth, now - self._start)
            if self._stop.wait(_INTERVAL):
                return


def available_bytes() -> int | None:
    """Memory that programs can still have without swapping, None outside of Linux."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
