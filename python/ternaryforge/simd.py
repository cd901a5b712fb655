# SPDX-License-Identifier: Apache-2.0
"""Which instruction sets this CPU has and which one the kernels use.

The environment variable TERNARYFORGE_TARGET chooses one before the first call.
"""

from ternaryforge._core import simd as _simd

__all__ = ["active_target", "supported_targets", "use_target"]


def supported_targets() -> list[str]:
    """Names of the targets that this build has and this CPU can run, the best first."""
    return _simd.supported_targets()


def active_target() -> str:
    """The target that kernels run on."""
    return _simd.active_target()


def use_target(name: str) -> None:
    """Makes every kernel of this process run on one target. Raises ValueError for another name."""
    _simd.use_target(name)
