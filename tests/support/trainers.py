"""transformers' Trainer and TRL's over a tiny model, and the loop by hand that they must equal."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import adapterkern as ak

ROWS = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(torch.arange(12) < 4, -100, ids)}
    for ids in torch.randint(1, 64, (16, 12), generator=torch.Generator().manual_seed(1))
]


def adapted(llama: PreTrainedModel | None = None, config: ak.AdapterConfig | None = None) -> ak.LlamaAdapter:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    if llama is None:
        # Tied embeddings: what writes a whole model to safetensors without knowing of them fails.
        llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.2))
    return ak.LlamaAdapter(llama, config or ak.AdapterConfig(adapter_dim=4))


def trainer(folder: Path, model: ak.LlamaAdapter, rows: Any = None, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "max_grad_norm": 0.0,  # ClippedAdamW clips
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    optimizer = ak.ClippedAdamW(model.adapter_parameters(), lr=1e-2, max_norm=0.3)
    return Trainer(
        model,
        TrainingArguments(**(defaults | arguments)),
        train_dataset=rows or ROWS,
        eval_dataset=ROWS[:6],
        optimizers=(optimizer, None),
    )


def weights(model: ak.LlamaAdapter) -> list[Tensor]:
    return [p.detach().clone() for p in model.adapter_parameters()]


def logged(run: Trainer, name: str) -> list[float]:
    return [record[name] for record in run.state.log_history if name in record]


def by_hand(model: ak.LlamaAdapter, batches: list[list[dict[str, Tensor]]], smoothing: float = 0.0) -> list[float]:
    """Clip, then AdamW, a batch a step, lr decaying linearly to 0; the losses."""
    optimizer = torch.optim.AdamW(model.adapter_parameters(), lr=1e-2, weight_decay=0.01)
    losses = []
    for step, batch in enumerate(batches):
        ids, labels = (torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=smoothing)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.adapter_parameters(), 0.3)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / len(batches))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def check_trainer(
    folder: Path, model: ak.LlamaAdapter, smoothing: float, checkpointing: bool = False, steps: int = 6
) -> None:
    """The losses and the weights of a loop by hand."""
    run = trainer(
        folder,
        model,
        ROWS[:4],  # every step has these four, in whatever order
        max_steps=steps,
        label_smoothing_factor=smoothing,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    run.train()
    other = adapted()
    expected = by_hand(other, [ROWS[:4]] * steps, smoothing)
    assert logged(run, "loss") == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(weights(model), weights(other), atol=1e-5, rtol=1e-4)


def sft_trainer(folder: Path, model: ak.LlamaAdapter, steps: int = 6, **more: Any) -> Any:
    """``steps`` on the first four rows, with a checkpoint at half of them."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in ROWS[:4]])
    defaults = {"max_steps": steps, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "logging_steps": 1}
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        **defaults,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        eos_token="</s>",
        pad_token="</s>",
        save_strategy="steps",
        save_steps=steps // 2,
    )
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), eos_token="</s>", bos_token="<s>"
    )
    optimizer = ak.ClippedAdamW(model.adapter_parameters(), lr=1e-2, max_norm=0.3)
    return trl.SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, optimizers=(optimizer, None), **more
    )


def check_sft_trainer(folder: Path, model: ak.LlamaAdapter, steps: int = 6) -> None:
    """Its fused LM head computes the loss from base_model's states: that must be the adapted backbone's."""
    run = sft_trainer(folder, model, steps)
    run.train()
    other = adapted()
    batch = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS[:4]]
    expected = by_hand(other, [batch] * steps)
    assert logged(run, "loss") == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(weights(model), weights(other), atol=1e-5, rtol=1e-4)
