"""AdapterHub's side of tests/test_adapterhub.py, in an environment of its own: adapters==1.3.0, transformers 4.57.

python make_adapterhub.py make              writes adapterhub/: a tiny LLaMA, adapters of it, and their logits; what is
                                            there already stays
python make_adapterhub.py check FOLDER...   loads what save_adapterhub wrote for that LLaMA, as adapters does,
                                            from .bin and from safetensors, and prints the logits as JSON
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).parent / "adapterhub"
SHAPE = {
    "vocab_size": 16,
    "hidden_size": 10,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "max_position_embeddings": 16,
    "initializer_range": 0.4,
    "tie_word_embeddings": True,
}
# 10 // (10/3) is 2.0 in floating point, so the reduction factor of 3 dimensions is not 10/3.
ADAPTERS: dict[str, dict[str, Any]] = {
    "layer": {"non_linearity": "silu", "reduction_factor": 10 / 3.5, "leave_out": [1]},
    "attention": {"non_linearity": "gelu", "reduction_factor": 5, "mh_adapter": True, "output_adapter": False},
    "mapping": {"non_linearity": "linear", "reduction_factor": {"0": 5, "default": 5.0}, "leave_out": [2]},
    "added_once": {
        "non_linearity": "relu",
        "reduction_factor": 2.0,
        "original_ln_after": False,
        "residual_before_ln": False,
    },
    "scaled": {"ln_before": False, "non_linearity": "silu", "reduction_factor": 2.0, "scaling": 0.5},
    "parallel": {"kind": adapters.ParBnConfig, "ln_before": False, "reduction_factor": 2.0, "leave_out": [0]},
    "parallel_attention": {
        "kind": adapters.ParBnConfig,
        "reduction_factor": 5,
        "mh_adapter": True,
        "output_adapter": False,
        "scaling": "learned",
    },
}


def ids() -> torch.Tensor:
    return (torch.arange(24) * 7 % 16).view(2, 12)


def llama() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    if GOLDEN.exists():
        model.load_state_dict(load_file(GOLDEN / "llama.safetensors"), strict=False)
        model.tie_weights()
    adapters.init(model)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def make() -> None:
    model = llama()
    if not GOLDEN.exists():
        GOLDEN.mkdir()
        backbone = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        save_file({k: v.contiguous() for k, v in backbone.items()}, GOLDEN / "llama.safetensors")
        save_file({"bare": logits(model)}, GOLDEN / "logits.safetensors")
    expected = load_file(GOLDEN / "logits.safetensors")
    for name, fields in ADAPTERS.items():
        if name in expected:
            continue
        fields = {"kind": adapters.SeqBnConfig, "ln_before": True} | fields
        model.add_adapter(name, config=fields.pop("kind")(**fields))
        model.set_active_adapters(name)
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." in key:
                torch.nn.init.normal_(parameter, std=0.3)
        expected[name] = logits(model)
        model.save_adapter(str(GOLDEN / name), name, with_head=False)
    save_file(expected, GOLDEN / "logits.safetensors")


def check(folders: list[str]) -> None:
    found = {}
    for folder in folders:
        for kind, file in (("bin", "pytorch_adapter.bin"), ("safetensors", "adapter.safetensors")):
            with tempfile.TemporaryDirectory() as alone:  # one of the two weight files, so that no other is read
                for name in ("adapter_config.json", file):
                    Path(alone, name).write_bytes(Path(folder, name).read_bytes())
                model = llama()
                info: dict[str, Any] = {}
                name = model.load_adapter(
                    alone, set_active=True, use_safetensors=kind == "safetensors", loading_info=info
                )
            found[f"{folder} {kind}"] = {"name": name, "logits": logits(model).tolist(), **info}
    print(json.dumps(found))


if __name__ == "__main__":
    make() if sys.argv[1:] == ["make"] else check(sys.argv[2:])
