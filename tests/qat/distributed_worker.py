# SPDX-License-Identifier: Apache-2.0
"""A short training of a small model, alone or as one of two processes: RANK FOLDER ddp|fsdp2 on the command line."""

import importlib
import sys
from pathlib import Path

from torch_setup import torch

from ternaryforge.torch import QATConfig, prepare_qat

DTensor = importlib.import_module("torch.distributed.tensor").DTensor
fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
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


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """Shards every layer over both processes; each is gathered before it runs."""
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main() -> None:
    """Trains as one of two processes and saves the weights."""
    rank, folder, how = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = small_model()
    if how == "fsdp2":
        shard(model)
        train(model, rank, 2)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    else:
        train(nn.parallel.DistributedDataParallel(model), rank, 2)
        state = model.state_dict()
    torch.save(state, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
