# SPDX-License-Identifier: Apache-2.0
"""A short training of a small model, alone or as one of two processes: RANK FOLDER on the command line."""

import sys
from pathlib import Path

from torch_setup import torch

from ternaryforge.torch import QATConfig, prepare_qat

nn = torch.nn


def small_model() -> torch.nn.Module:
    """A model with learned scales per group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(72, 24), nn.ReLU(), nn.Linear(24, 8, bias=False))
    return prepare_qat(model, QATConfig(quantizer="lsq", scale="group", group_size=64))


def train(model: torch.nn.Module, rank: int, world: int) -> None:
    """Five steps on this process's part of eight rows each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for _ in range(5):
        inputs, targets = torch.randn(8, 72, generator=generator), torch.randn(8, 8, generator=generator)
        loss = (model(inputs[mine]) - targets[mine]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Trains as one of two processes and saves the weights."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = small_model()
    train(nn.parallel.DistributedDataParallel(model), rank, 2)
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
