"""Fixtures that many tests share: the data beside the checkout, and one test run per CPU target."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ternaryforge import _core

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared; its tests carry the marker `shared` and skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def many_workers() -> None:
    """Lets calls have as many workers as they ask for, so that shares of many are tested on few CPUs."""
    _core.parallel.limit_workers(on=False)


@pytest.fixture(params=_core.simd.supported_targets())
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces each target of this CPU in turn, and proves that dispatch reaches it."""
    name: str = request.param
    previous = _core.simd.active_target()
    _core.simd.use_target(name)
    try:
        assert _core.simd.dispatched_target() == name
        yield name
    finally:
        _core.simd.use_target(previous)
