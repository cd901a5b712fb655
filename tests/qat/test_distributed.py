# SPDX-License-Identifier: Apache-2.0
"""Two processes that share a batch (DDP, FSDP2; over gloo) train the same weights as one process that sees it whole."""

import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
from torch_setup import torch


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(how: str, tmp_path: Path) -> None:
    command = [sys.executable, distributed_worker.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path), how], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    alone = distributed_worker.small_model()
    distributed_worker.train(alone, 0, 1)
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert "0.quantizer.scale" in alone.state_dict()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], tensor, rtol=1e-4, atol=1e-5), name
