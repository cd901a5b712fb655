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


def run_program(program: str) -> None:
    """In a fresh process, whose teams are limited. A hang fails by the time-out."""
    header = """
        import os, sys
        import numpy as np
        from ternaryforge import _core

        def linear(threads, activations="int8"):
            tensor = _core.formats.PackedTensor(
                "t16", 256, 256, _core.formats.pack(trits, "t16"), scale_kind="tensor", scales=np.ones(1, np.float32)
            )
            return _core.kernels.linear(x, tensor, activations=activations, threads=threads)

        trits = np.random.default_rng(0).integers(-1, 2, (256, 256)).astype(np.int8)
        x = np.random.default_rng(1).normal(size=(5, 256)).astype(np.float32)
    """
    source = textwrap.dedent(header) + textwrap.dedent(program)
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity mask")
def test_no_more_workers_than_cpus() -> None:
    run_program("""
        cpus = os.sched_getaffinity(0)
        counts = range(1, len(cpus) + 1)
        assert [_core.parallel.workers(n) for n in counts] == list(counts)
        assert _core.parallel.workers(len(cpus) + 1) == _core.parallel.workers(1000) == len(cpus)
        expected = linear(1)
        assert np.array_equal(linear(1000), expected)
        os.sched_setaffinity(0, [min(cpus)])  # as a container may do at any time
        assert _core.parallel.workers(1000) == 1
        assert np.array_equal(linear(1000), expected)
        os.sched_setaffinity(0, cpus)
        assert _core.parallel.workers(1000) == len(cpus)
        _core.parallel.limit_workers(on=False)
        assert _core.parallel.workers(40) == 40
        _core.parallel.limit_workers(on=True)
        assert _core.parallel.workers(1000) == len(cpus)
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("first", ["torch", "ternaryforge"])
def test_torch_beside_us_shares_one_runtime_and_its_threads(first: str) -> None:
    pytest.importorskip("torch")
    use_ours, use_torch = (
        "before = linear(2)\n",
        "import torch\nproduct = torch.mm(torch.ones(512, 512), torch.ones(512, 512))\n",
    )
    program = (use_torch + use_ours) if first == "torch" else (use_ours + use_torch)
    program += textwrap.dedent("""
        def threads():
            return len(os.listdir("/proc/self/task"))

        with open("/proc/self/maps") as file:
            runtimes = {line.split()[-1] for line in file if "libgomp" in line}
        assert len(runtimes) == (1 if _core.parallel.backend() == "openmp" else 0), runtimes
        _core.parallel.limit_workers(on=False)
        torch.set_num_threads(2)
        for count in (1, 2, 3, 2):
            assert np.array_equal(linear(count), before)
            assert torch.get_num_threads() == 2
            assert torch.equal(torch.mm(torch.ones(512, 512), torch.ones(512, 512)), product)
        running = threads()
        for _ in range(5):  # taking turns starts no more threads; the third of above may still be leaving
            linear(2)
            assert threads() <= running
            torch.mm(product, product)
            assert threads() <= running
    """)
    run_program(program)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_child_does_not_wait_for_threads_of_torch() -> None:
    pytest.importorskip("torch")
    # The parent has used the shared runtime through torch only.
    run_program("""
        import torch
        torch.mm(torch.ones(512, 512), torch.ones(512, 512))
        child = os.fork()
        if child == 0:
            same = np.array_equal(linear(2), linear(1))
            os._exit(0 if same and _core.parallel.backend() == "std::thread" else 1)
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    """)


def test_several_python_threads_at_once() -> None:
    x, tensor = made_case()
    expected = _core.kernels.linear(x, tensor, activations="int8", threads=1)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(_core.kernels.linear, x, tensor, activations="int8", threads=2) for _ in range(40)]
        for run in runs:
            np.testing.assert_array_equal(run.result(), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_child_does_not_wait_for_threads_of_its_parent() -> None:
    run_program("""
        before = linear(2, activations="float")
        child = os.fork()
        if child == 0:
            after = linear(2, activations="float")
            os._exit(0 if np.array_equal(before, after) and _core.parallel.backend() == "std::thread" else 1)
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    """)


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
