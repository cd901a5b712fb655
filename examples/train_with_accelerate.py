# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own with Accelerate: learned scales for groups, distillation from the dense model.

Run: python train_with_accelerate.py --out run
     accelerate launch --cpu --num_processes 2 train_with_accelerate.py --out run --model FOLDER --text stories.txt
"""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from story_model import load_dense, parser, stories, windows
from torch.utils.data import DataLoader

from ternaryforge.hf import export_bitnet
from ternaryforge.torch import DistillationLoss, QATConfig, prepare_qat, set_strength, warmup_strength


def main() -> None:
    """Trains and exports."""
    args = parser(__doc__).parse_args()
    set_seed(args.seed)
    accelerator = Accelerator(cpu=True)
    rows = windows(args.model, stories(args.text, args.seed), args.length)
    teacher = load_dense(args.model).eval().requires_grad_(requires_grad=False)
    config = QATConfig(quantizer="lsq", scale="group", group_size=64, activation_bits=None)
    student = prepare_qat(copy.deepcopy(teacher).requires_grad_(requires_grad=True), config)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    loader = DataLoader(rows, batch_size=args.batch, shuffle=True, drop_last=True)
    student, optimizer, loader, schedule = accelerator.prepare(student, optimizer, loader, schedule)
    loss, step = DistillationLoss(kl=1.0), 0
    student.train()
    while step < args.steps:
        for ids in loader:
            strength = warmup_strength(step, args.steps // 3, "cosine")
            set_strength(student, strength if strength < 1 else None)
            with torch.no_grad():
                guide = teacher(ids)
            terms = loss(student(ids), guide, labels=ids)
            accelerator.backward(terms.total)
            accelerator.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % max(1, args.steps // 6) == 0:
                accelerator.print(f"step {step}: divergence {terms.total.item():.4f}")
            step += 1
            if step == args.steps:
                break
    model = accelerator.unwrap_model(student)
    set_strength(model, None)
    if accelerator.is_main_process:
        model.save_pretrained(args.out / "master")
        report = export_bitnet(args.out / "master", args.out / "ternary", "ternaryforge")
        print(f"{report.bits_per_weight:.3f} bits per weight, {report.zero_fraction:.1%} zeros")


if __name__ == "__main__":
    main()
