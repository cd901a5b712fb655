# SPDX-License-Identifier: Apache-2.0
"""Threads of the core: more than there are cores, several callers at once, and after fork()."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ternaryforge import _core


def made_case() -> tuple[np.ndarray, _core.formats.PackedTensor]:
    trits = np.random.default_rng(0).integers(-1, 2, (256, 256)).astype(np.int8)
    tensor = _core.formats.PackedTensor(
        "t16", 256, 256, _core.formats.pack(trits, "t16"), scale_kind="tensor", scales=np.ones(1, np.float32)
    )
    return np.random.default_rng(1).normal(size=(5, 256)).astype(np.float32), tensor


def test_default_threads_fit_the_machine() -> None:
    assert 1 <= _core.parallel.default_threads() <= 4096
    assert _core.parallel.backend() in {"openmp", "std::thread"}


@pytest.mark.parametrize("value", ["3", "0", "-1", "two", "4x"])
def test_the_environment_sets_the_number_of_threads(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TERNARYFORGE_NUM_THREADS", value)
    if value == "3":
        assert _core.parallel.default_threads() == 3
    else:
        with pytest.raises(ValueError, match=f"positive number, got '{value}'"):
            _core.parallel.default_threads()


def test_more_threads_than_cores_and_than_panels() -> None:
    x, tensor = made_case()
    expected = _core.kernels.linear(x, tensor, activations="int8", threads=1)
    np.testing.assert_array_equal(_core.kernels.linear(x, tensor, activations="int8", threads=40), expected)


def test_several_python_threads_at_once() -> None:
    x, tensor = made_case()
    expected = _core.kernels.linear(x, tensor, activations="int8", threads=1)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(_core.kernels.linear, x, tensor, activations="int8", threads=2) for _ in range(40)]
        for run in runs:
            np.testing.assert_array_equal(run.result(), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_child_does_not_wait_for_threads_of_its_parent() -> None:
    program = textwrap.dedent("""
        import os, sys
        import numpy as np
        from ternaryforge import _core

        trits = np.ones((64, 64), np.int8)
        tensor = _core.formats.PackedTensor(
            "t16", 64, 64, _core.formats.pack(trits, "t16"), scale_kind="tensor", scales=np.ones(1, np.float32)
        )
        x = np.ones((2, 64), np.float32)
        before = _core.kernels.linear(x, tensor, activations="float", threads=2)
        child = os.fork()
        if child == 0:
            after = _core.kernels.linear(x, tensor, activations="float", threads=2)
            os._exit(0 if np.array_equal(before, after) and _core.parallel.backend() == "std::thread" else 1)
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    """)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_environment_names_the_target() -> None:
    program = "from ternaryforge import _core; print(_core.simd.active_target(), _core.simd.dispatched_target())"
    for name in _core.simd.supported_targets():
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "TERNARYFORGE_TARGET": name},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert run.stdout.split() == [name, name]
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TERNARYFORGE_TARGET": "mmx"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode != 0
    assert "got 'mmx'" in run.stderr


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'avx1024'"):
        _core.simd.use_target("avx1024")


def test_the_self_test_passes(target: str) -> None:
    assert _core.kernels.self_test() == []
