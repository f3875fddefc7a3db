"""Your own PyTorch loop: adapters with ClippedAdamW on a text file, in mixed precision.

python examples/own_loop.py --model ./llama --train book.txt --precision bf16
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import adapterkern as ak
from adapterkern.model.backbone import load_backbone

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a hub name or a folder")
parser.add_argument("--train", required=True, help="a text file to learn from")
parser.add_argument("--output", default="runs/own-loop", help="the folder for the adapter")
parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of autocast")
parser.add_argument("--length", type=int, default=128, help="tokens per row")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--log-every", type=int, default=10, help="steps between log lines")
args = parser.parse_args()

# The tokens of the whole text, cut into rows of equal length.
llama, tokenizer = load_backbone(args.model)
lines = Path(args.train).read_text(encoding="utf-8").splitlines(keepends=True)
ids = torch.tensor([token for row in tokenizer(lines, add_special_tokens=False)["input_ids"] for token in row])
rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)

torch.manual_seed(0)
model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=64, every=2)).train()
loader: DataLoader[torch.Tensor] = DataLoader(rows, args.batch_size, shuffle=True)  # a tensor is a data set of its rows
# A torch optimizer that clips by the global norm: no clip_grad_norm_, and no wait for the device.
optimizer = ak.ClippedAdamW(model.adapter_parameters(), lr=args.lr, max_norm=1.0)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
# fp16 needs a gradient scaler. Call no unscale_: ClippedAdamW unscales, and skips a step that overflows.
device, dtype = model.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
scaler = torch.amp.GradScaler(device, enabled=args.precision == "fp16")

step = 0
for _ in range(args.epochs):
    for batch in loader:
        batch = batch.to(model.device)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = model(input_ids=batch, labels=batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        if step % args.log_every == 0:  # .item() waits for the device, so only here
            print(f"step {step}: loss {loss.item():.4f}, grad norm {optimizer.grad_norm.item():.3f}")

model.save_pretrained(args.output)
print(f"saved in {args.output}")
