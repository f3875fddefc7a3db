"""PEFT's side of tests/model/test_peft.py: ``python -m tests.golden.make_peft`` writes peft/, with peft 0.21.2."""

from pathlib import Path

import torch
from peft import AdaptionPromptConfig, get_peft_model

from tests.support.tiny_llama import tiny

FOLDER = Path(__file__).parent / "peft"

if __name__ == "__main__":
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny(), config)
    for number, (name, p) in enumerate(sorted(model.named_parameters())):
        if "adaption" in name:
            torch.nn.init.constant_(p, number / 64)
    model.save_pretrained(FOLDER)
    (FOLDER / "README.md").unlink()
