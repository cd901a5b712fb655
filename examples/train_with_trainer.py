# SPDX-License-Identifier: Apache-2.0
"""Quantisation-aware training in the Trainer of transformers, to a packed checkpoint that the engine runs.

Run: python train_with_trainer.py --out run                    (the embedded model, 20 seconds on two cores)
     python train_with_trainer.py --out run --model FOLDER --text stories.txt --steps 2000
"""

from pathlib import Path

from story_model import load_dense, parser, stories, windows
from transformers import Trainer, TrainingArguments, set_seed

import ternaryforge as tf
from ternaryforge.hf import LambdaWarmupCallback, TernaryMonitorCallback, export_bitnet
from ternaryforge.sources import find_source
from ternaryforge.tokenizer import Tokenizer
from ternaryforge.torch import QATConfig, prepare_qat


def main() -> None:
    """Trains, exports, writes a story."""
    args = parser(__doc__).parse_args()
    set_seed(args.seed)
    rows = windows(args.model, stories(args.text, args.seed), args.length)
    model = prepare_qat(load_dense(args.model), QATConfig(quantizer="absmean", scale="tensor", activation_bits=8))
    arguments = TrainingArguments(
        output_dir=str(args.out / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=args.seed,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    callbacks = [LambdaWarmupCallback(0.3), TernaryMonitorCallback(every=max(1, args.steps // 6))]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    master, packed = args.out / "master", args.out / "ternary"
    trainer.save_model(str(master))
    copy_tokenizer(args.model, master)
    report = export_bitnet(master, packed)
    print(f"{report.bits_per_weight:.3f} bits per weight, {report.zero_fraction:.1%} zeros, {report.file_bytes} bytes")
    print(tf.TernaryModel.from_pretrained(packed).generate("Once upon a time", max_new_tokens=40).text)


def copy_tokenizer(model: str, folder: Path) -> None:
    """Puts the tokenizer's files beside latents, from where export takes them along."""
    source = find_source(model, download=False)
    for pattern in ("tokenizer*", "generation_config.json"):
        for file in source.glob(pattern):
            (folder / file.name).write_bytes(file.read_bytes())
    Tokenizer.from_folder(folder)


if __name__ == "__main__":
    main()
