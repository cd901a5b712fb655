# SPDX-License-Identifier: Apache-2.0
"""The machine that a benchmark ran on: what it is, and what it can do at most."""

import dataclasses
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ternaryforge import _core
from ternaryforge.report import Report

_BANDWIDTH_BYTES = 768 << 20  # several times any cache of today
_PASSES = 9
_POWER = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Machine(Report):
    """Where a benchmark ran. Rates are of all threads together, by their number.

    `read_bandwidth`: bytes per second read from memory. `dot_peak`: multiply-adds of int8 per
    second in the dot step of a target, by target. Both are measured, not looked up.
    """

    cpu: str
    cores: int
    system: str
    compiler: str
    highway: str
    thread_backend: str
    read_bandwidth: dict[int, float] = field(repr=False)
    dot_peak: dict[str, dict[int, float]] = field(repr=False)

    def best(self, other: "Machine") -> "Machine":
        """The higher rates of two measurements of the same threads and targets."""
        return dataclasses.replace(
            self,
            read_bandwidth={n: max(rate, other.read_bandwidth[n]) for n, rate in self.read_bandwidth.items()},
            dot_peak={
                target: {n: max(rate, other.dot_peak[target][n]) for n, rate in rates.items()}
                for target, rates in self.dot_peak.items()
            },
        )


def measure_machine(
    *, threads: Sequence[int], targets: Sequence[str] | None = None, bandwidth_bytes: int = _BANDWIDTH_BYTES
) -> Machine:
    """Measures bandwidth and dot peak; a second or two. Leaves the active target as it was."""
    active = _core.simd.active_target()
    try:
        peaks = {}
        for target in targets or [active]:
            _core.simd.use_target(target)
            peaks[target] = {count: _dot_peak(count) for count in threads}
    finally:
        _core.simd.use_target(active)
    return Machine(
        cpu=cpu_name(),
        cores=_core.parallel.default_threads() if "TERNARYFORGE_NUM_THREADS" not in os.environ else os.cpu_count() or 1,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        compiler=_core.simd.compiler(),
        highway=_core.simd.highway_version(),
        thread_backend=_core.parallel.backend(),
        read_bandwidth={
            count: _core.kernels.read_bandwidth(size=bandwidth_bytes, passes=_PASSES, threads=count)
            for count in threads
        },
        dot_peak=peaks,
    )


def _dot_peak(threads: int) -> float:
    rounds = 1 << 12
    while True:  # until a pass is long enough that starting threads does not count
        start = time.perf_counter()
        _core.kernels.dot_peak(rounds=rounds, passes=1, threads=threads)
        if time.perf_counter() - start > 0.01:
            return _core.kernels.dot_peak(rounds=rounds, passes=_PASSES, threads=threads)
        rounds *= 4


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


class EnergyMeter:
    """Joules that the processor packages took since `start`, by Linux's RAPL counters.

    `stop` gives None where the machine does not tell, as in most virtual machines.
    """

    def __init__(self, folder: Path = _POWER) -> None:
        self._zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if _is_package(zone)]
        self._before: list[int] | None = None

    def start(self) -> None:
        """Reads the counters."""
        self._before = self._read()

    def stop(self) -> float | None:
        """Joules since `start`."""
        before, after = self._before, self._read()
        if not self._zones or before is None or after is None:
            return None
        total = 0
        for zone, first, last in zip(self._zones, before, after, strict=True):
            spent = last - first
            if spent < 0:  # the counter started again at zero
                spent += int((zone / "max_energy_range_uj").read_text(encoding="ascii")) + 1
            total += spent
        return total / 1e6

    def _read(self) -> list[int] | None:
        try:
            return [int((zone / "energy_uj").read_text(encoding="ascii")) for zone in self._zones]
        except OSError:  # only root may read them on many systems
            return None


def _is_package(zone: Path) -> bool:
    try:
        return (zone / "name").read_text(encoding="ascii").startswith("package")
    except OSError:
        return False
