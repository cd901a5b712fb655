# SPDX-License-Identifier: Apache-2.0
"""What this machine can run, and whether the kernels are right on it."""

import importlib.metadata
import platform
from dataclasses import dataclass

from ternaryforge import _core
from ternaryforge.machine import cpu_name
from ternaryforge.report import Report

_PACKAGES = (
    "ternaryforge", "numpy", "tokenizers", "huggingface_hub", "typer", "rich",
    "torch", "transformers",
)  # fmt: skip
_MANY_WEIGHTS = 2**31  # more than any cache holds


@dataclass(frozen=True)
class Diagnosis(Report):
    """`self_test` maps each target to its failures; all lists empty means that all is well.

    `layout` is the run-time layout of large ternary models that is faster here, with int8 activations. `versions`
    holds None for an optional package that is not installed.
    """

    cpu: str
    system: str
    targets: list[str]
    active_target: str
    self_test: dict[str, list[str]]
    threads: int
    thread_backend: str
    layout: str
    versions: dict[str, str | None]

    @property
    def healthy(self) -> bool:
        """Whether every self-test passed."""
        return not any(self.self_test.values())


def diagnose() -> Diagnosis:
    """Runs the self-test on every target of this CPU and lists versions. Takes a few seconds."""
    targets = _core.simd.supported_targets()
    active = _core.simd.active_target()
    threads = _core.parallel.default_threads()
    failures = {}
    try:
        for target in targets:
            _core.simd.use_target(target)
            failures[target] = _core.kernels.self_test()
    finally:
        _core.simd.use_target(active)
    return Diagnosis(
        cpu=cpu_name(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        targets=targets,
        active_target=active,
        self_test=failures,
        threads=threads,
        thread_backend=_core.parallel.backend(),
        layout=_core.kernels.fastest_layout(_MANY_WEIGHTS, activations="int8", threads=threads),
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
