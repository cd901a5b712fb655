# SPDX-License-Identifier: Apache-2.0
"""A short, always equal run of the GGUF fuzzer."""

from pathlib import Path

import fuzz_gguf


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    for content in fuzz_gguf.seeds():
        path = tmp_path / "seed.gguf"
        path.write_bytes(content)
        assert fuzz_gguf.read_all(path), "the seeds themselves are right"
    accepted = fuzz_gguf.run(tmp_path, 2000, seed=0)
    assert 100 < accepted < 1900, "mutations reach both sides"
