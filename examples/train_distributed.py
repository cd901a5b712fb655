# SPDX-License-Identifier: Apache-2.0
"""Several processes train one model, with DDP or with FSDP2, which shards latents, gradients and optimizer state.

Run: torchrun --standalone --nproc-per-node 2 train_distributed.py --out run --sharding fsdp2
     torchrun --nnodes 2 --nproc-per-node 4 --rdzv-endpoint HOST:29500 train_distributed.py --out run --model FOLDER ...

Prepare first, then shard: FSDP2 gathers a layer before it runs, so that a scale is that of the whole matrix. Tensor
parallelism, which never gathers it, is refused.
"""

import torch
import torch.distributed as dist
from story_model import load_dense, parser, stories, windows
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from ternaryforge.hf import export_bitnet
from ternaryforge.torch import QATConfig, prepare_qat


def main() -> None:
    """Trains; process 0 writes the latents and packs them."""
    options = parser(__doc__)
    options.add_argument("--sharding", choices=("ddp", "fsdp2"), default="fsdp2")
    args = options.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(args.seed)
    rows = windows(args.model, stories(args.text, args.seed), args.length)
    model = prepare_qat(load_dense(args.model), QATConfig(quantizer="absmean", scale="tensor", activation_bits=8))
    if args.sharding == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    sampler = DistributedSampler(rows, seed=args.seed, drop_last=True)
    loader = DataLoader(rows, batch_size=args.batch, sampler=sampler)
    step = 0
    while step < args.steps:
        sampler.set_epoch(step)
        for ids in loader:
            loss = wrapped(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0 and step % max(1, args.steps // 6) == 0:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
            step += 1
            if step == args.steps:
                break
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        # A model of its own writes the files, since the sharded one holds only parts.
        whole = prepare_qat(load_dense(args.model), QATConfig(quantizer="absmean", scale="tensor", activation_bits=8))
        whole.load_state_dict(state)
        whole.save_pretrained(args.out / "master")
        report = export_bitnet(args.out / "master", args.out / "ternary")
        print(f"{report.bits_per_weight:.3f} bits per weight, {report.zero_fraction:.1%} zeros")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
