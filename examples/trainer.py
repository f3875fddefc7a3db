"""Adapters in transformers' Trainer, or with --sft in TRL's SFTTrainer (pip install trl), on a text file.

python examples/trainer.py --model ./llama --train texts.txt
"""

import argparse
from pathlib import Path

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import adapterkern as ak
from adapterkern.model.backbone import load_backbone

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a hub name or a folder")
parser.add_argument("--train", required=True, help="a text file to learn from, one text per line")
parser.add_argument("--output", default="runs/trainer", help="the folder for checkpoints and the adapter")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--sft", action="store_true", help="use TRL's SFTTrainer")
args = parser.parse_args()

llama, tokenizer = load_backbone(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
texts = [line for line in Path(args.train).read_text(encoding="utf-8").splitlines() if line.strip()]

torch.manual_seed(0)
model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=64, every=2))
model.print_trainable_parameters()
optimizer = ak.ClippedAdamW(model.adapter_parameters(), lr=args.lr, max_norm=1.0)
arguments = {
    "output_dir": args.output,
    "num_train_epochs": args.epochs,
    "per_device_train_batch_size": 8,
    "max_grad_norm": 0.0,  # ClippedAdamW clips
    "bf16": torch.cuda.is_available(),
    "logging_steps": 10,
    "report_to": [],
}

if args.sft:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer: Trainer = SFTTrainer(
        model,
        SFTConfig(**arguments, max_length=256),
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
else:
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=[tokenizer(text, truncation=True, max_length=256) for text in texts],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizers=(optimizer, None),
    )
result = trainer.train()
trainer.save_model(args.output)  # the adapter alone: ak.LlamaAdapter.from_pretrained(llama, args.output) loads it
print(f"mean loss {result.training_loss:.4f}, saved in {args.output}")
