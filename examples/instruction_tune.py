"""Instruction-tune a LLaMA on JSONL rows with the keys prompt and completion, then let it answer.

python examples/instruction_tune.py --model ./llama --train train.jsonl --eval test.jsonl --prompt "Q: Who are you? A:"

Only completions are learned. Prompt and completion are tokenized as one text: let the completion, not the prompt, have
the space between them. {"prompt": "Q: Who are you? A:", "completion": " A helpful assistant."}
"""

import argparse

import torch

import adapterkern as ak
from adapterkern.model.backbone import load_backbone

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a hub name or a folder")
parser.add_argument("--train", required=True, help="a JSONL, CSV or TSV file to learn from")
parser.add_argument("--eval", required=True, help="the same, to evaluate on")
parser.add_argument("--prompt", required=True, help="to answer before and after")
parser.add_argument("--output", default="runs/instruct", help="the folder for what is trained")
parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--lr", type=float, help="default: by the width of the backbone")
parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the training")
args = parser.parse_args()

llama, tokenizer = load_backbone(args.model)
torch.manual_seed(0)  # of the new adapters; the run seeds itself
model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=64, every=2))
model.print_trainable_parameters()
config = ak.TrainConfig(
    task="causal-lm",
    epochs=args.epochs,
    lr=args.lr,
    precision=args.precision,
    output_dir=args.output,
    overwrite=args.overwrite,
)

# New adapters change nothing, so this is the backbone's own perplexity.
before = ak.evaluate(model, args.eval, config, tokenizer=tokenizer)
result = ak.train(model, args.train, config, tokenizer=tokenizer, eval_data=args.eval)
print(f"perplexity {before['perplexity']:.3f} -> {result.metrics['perplexity']:.3f}, saved in {args.output}")


def answer() -> str:
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# Load what was saved, as a new process would, and generate: first without the adapters, then with them.
model = ak.LlamaAdapter.from_pretrained(model.unload(), args.output).eval()
with model.disable_adapter():
    print("before:", answer())
print("after:", answer())
