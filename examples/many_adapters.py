"""Many adapters in one batch over one backbone: every row runs its own adapter, also in generate.

python examples/many_adapters.py --model ./llama --adapters runs/instruct runs/own-loop
"""

import argparse
from pathlib import Path

import torch

import adapterkern as ak
from adapterkern.model.backbone import load_backbone

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a hub name or a folder")
parser.add_argument("--adapters", nargs="+", required=True, metavar="FOLDER", help="saved adapters of this model")
parser.add_argument("--prompts", nargs="+", default=["Once upon a time", "The answer is"])
parser.add_argument("--tokens", type=int, default=16, help="new tokens per answer")
args = parser.parse_args()

# One backbone, several adapters, each named after its folder.
llama, tokenizer = load_backbone(args.model)
model = ak.LlamaAdapter(llama, None).eval()
names = [Path(folder).name for folder in args.adapters]
for folder, name in zip(args.adapters, names, strict=True):
    model.load_adapter(folder, name)

# One row per pair of prompt and adapter; "__base__" is the bare backbone. Prompts are padded on the left, to generate.
rows = [(prompt, name) for prompt in args.prompts for name in (*names, "__base__")]
row_names = [name for _, name in rows]
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
tokenizer.padding_side = "left"
inputs = tokenizer([prompt for prompt, _ in rows], padding=True, return_tensors="pt").to(model.device)
options = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
prompt_length = inputs["input_ids"].shape[1]

# One forward of the mixed batch gives each row what a forward with its adapter alone gives.
with torch.no_grad():
    mixed = model(**inputs, adapter_names=row_names).logits
    for name in names:
        model.set_adapter(name)
        chosen = [row for row, row_name in enumerate(row_names) if row_name == name]
        alone = model(**{key: value[chosen] for key, value in inputs.items()}).logits
        print(f"{name}: logits differ by at most {(mixed[chosen] - alone).abs().max():.1e}")

# generate takes adapter_names as well.
outputs = model.generate(**inputs, adapter_names=row_names, **options)
for (prompt, name), output in zip(rows, outputs, strict=True):
    print(f"{name}: {prompt} ->", tokenizer.decode(output[prompt_length:], skip_special_tokens=True))

# Several adapters in one row, weighted: here equally. index and weight have shape (rows, adapters).
index = torch.arange(len(names), device=model.device).expand(len(rows), -1)
with model.mixing(names, index, torch.full(index.shape, 1 / len(names), device=model.device)):
    outputs = model.generate(**inputs, **options)
print(f"blend: {args.prompts[0]} ->", tokenizer.decode(outputs[0, prompt_length:], skip_special_tokens=True))
