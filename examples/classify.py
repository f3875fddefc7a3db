"""Classify texts: train on your CSV (columns text and label), evaluate, save, load, label new texts.

python examples/classify.py --model ./llama --train train.csv --eval test.csv
"""

import argparse

import torch

import adapterkern as ak
from adapterkern.model.backbone import load_backbone
from adapterkern.training import load_run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a hub name or a folder")
parser.add_argument("--train", required=True, help="a CSV, TSV or JSONL file to learn from")
parser.add_argument("--eval", required=True, help="the same, to evaluate on")
parser.add_argument("--output", default="runs/classify", help="the folder for what is trained")
parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--lr", type=float, help="default: by the width of the backbone")
parser.add_argument("--texts", nargs="+", default=["The team won again.", "Shares fell by 3 %."], help="to label")
args = parser.parse_args()

# A frozen backbone with adapters after its last three layers. The layers below run only once per text.
llama, tokenizer = load_backbone(args.model)
torch.manual_seed(0)  # of the new adapters; the run seeds itself
model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=64, layers=[-3, -2, -1]))
model.print_trainable_parameters()

# Train, evaluate after each epoch, and save: the adapters and a head for the labels found in the training file.
config = ak.TrainConfig(epochs=args.epochs, lr=args.lr, output_dir=args.output, overwrite=args.overwrite)
result = ak.train(model, args.train, config, tokenizer=tokenizer, eval_data=args.eval)
print(f"trained: accuracy {result.metrics['accuracy']:.4f}, saved in {args.output}")

# Load: what was saved, on a backbone without adapters. In a new process that is load_backbone's.
config, head = load_run(args.output)
model = ak.LlamaAdapter.from_pretrained(model.unload(), args.output)
metrics = ak.evaluate(model, args.eval, config, tokenizer=tokenizer, head=head)
print(f"loaded: accuracy {metrics['accuracy']:.4f}")

# Label new texts. In a new process ak.predict(args.output, rows) needs nothing else.
rows = [{"text": text} for text in args.texts]
for text, found in zip(args.texts, ak.predict(model, rows, config, tokenizer=tokenizer, head=head), strict=True):
    print(f"{found.label}\t{found.probability:.4f}\t{text}")
