"""What commands read in tests, and what they print."""

import json
from pathlib import Path

import torch

TOPICS = {"fruit": ["apple", "pear", "plum", "cherry"], "metal": ["iron", "copper", "zinc", "silver"]}


def write_texts(path: Path, count: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for i in range(count):
            label = list(TOPICS)[i % 2]
            picks = torch.randint(0, 4, (3,), generator=generator).tolist()
            text = " and the ".join(TOPICS[label][p] for p in picks)
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return path


def accuracy(text: str) -> float:
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("accuracy")))
