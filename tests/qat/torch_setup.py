# SPDX-License-Identifier: Apache-2.0
"""Loads PyTorch for tests, on one thread; a module that imports this one skips where it is absent."""

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
