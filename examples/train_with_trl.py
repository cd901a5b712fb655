# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on conversations with TRL's SFTTrainer: chat template, loss on the assistant's words alone.

Run: pip install trl        (tried with 1.16.0)
     python train_with_trl.py --out run                        (the embedded model, a few toy conversations)
     python train_with_trl.py --out run --model FOLDER --conversations chats.jsonl

Each line of --conversations is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}.
`{% generation %}` in the template marks what the assistant says; `assistant_only_loss` masks all else.
"""

import json
from pathlib import Path

from datasets import Dataset
from story_model import load_dense, parser
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from ternaryforge.hf import LambdaWarmupCallback, export_bitnet
from ternaryforge.sources import find_source
from ternaryforge.torch import QATConfig, prepare_qat

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}Answer: "
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}Question: {{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer: {% endif %}"
)
TOYS = (
    ("Who lost a red ball?", "Lily lost her red ball in the park."),
    ("What did the dog find?", "The dog found a big bone under the tree."),
    ("Where did Tom go?", "Tom went to the sea with his mom."),
    ("Why was the bird sad?", "The bird was sad because it could not fly."),
)


def conversations(file: Path | None) -> Dataset:
    """Rows with `messages`."""
    if file is not None:
        return Dataset.from_list([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in TOYS]
    return Dataset.from_list([{"messages": row} for row in rows * 8])


def main() -> None:
    """Trains and exports."""
    options = parser(__doc__)
    options.add_argument("--conversations", type=Path)
    args = options.parse_args()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(find_source(args.model, download=False))
    if "{% generation %}" not in (tokenizer.chat_template or ""):
        tokenizer.chat_template = TEMPLATE
    model = prepare_qat(load_dense(args.model), QATConfig(quantizer="absmean", scale="tensor", activation_bits=8))
    arguments = SFTConfig(
        output_dir=str(args.out / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        max_length=args.length,
        learning_rate=args.lr,
        weight_decay=0.0,
        assistant_only_loss=True,
        bf16=False,
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=args.seed,
    )
    data = conversations(args.conversations)
    trainer = SFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[LambdaWarmupCallback(0.3)]
    )
    batch = next(iter(trainer.get_train_dataloader()))
    scored = batch["labels"][0] != -100
    print(f"the loss sees: {tokenizer.decode(batch['input_ids'][0][scored])!r}")
    trainer.train()
    trainer.save_model(str(args.out / "master"))
    report = export_bitnet(args.out / "master", args.out / "ternary")
    print(f"{report.bits_per_weight:.3f} bits per weight, {report.zero_fraction:.1%} zeros")


if __name__ == "__main__":
    main()
