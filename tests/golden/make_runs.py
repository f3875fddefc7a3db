"""Runs of every kind as commit 7a35329 left them, before the package had rooms: they must load for ever.

python make_runs.py      in a checkout of that commit; writes runs/
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapterkern import AdapterConfig, LlamaAdapter, TrainConfig, evaluate, train
from adapterkern.training.backbone import Sources, load_backbone, save_sources
from adapterkern.training.distillation import Distillation, KeepBehaviour, WithKept
from adapterkern.training.multitask import MultiTask
from adapterkern.training.qa import QuestionAnswering, SpanSettings
from adapterkern.training.router import RoutingConfig
from adapterkern.training.routing import RoutedTask

GOLDEN = Path(__file__).resolve().parent / "runs"
WORDS = ["red", "blue", "green", "black", "white", "pink", "gray", "gold", "tan", "teal"]


def backbone() -> None:
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=2)}
    core = Tokenizer(BPE(vocab={"<s>": 0, "</s>": 1} | alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(GOLDEN / "backbone")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(GOLDEN / "backbone")


def rows() -> None:
    colors = [
        {"text": f"{a} {b}", "label": "yes" if i < j else "no"}
        for i, a in enumerate(WORDS[:4])
        for j, b in enumerate(WORDS[:4])
        if i != j
    ]
    texts = [{"prompt": f"{a}: ", "completion": b} for a, b in zip(WORDS, reversed(WORDS), strict=True)]
    questions = [
        {
            "id": f"q{i}",
            "question": "Second?",
            "context": f"{a} {b}",
            "answers": [{"text": b, "answer_start": len(a) + 1}],
        }
        for i, (a, b) in enumerate(zip(WORDS, WORDS[3:], strict=False))
    ]
    for name, made in (("colors", colors), ("texts", texts), ("questions", questions)):
        (GOLDEN / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def config(name: str, **values: Any) -> TrainConfig:
    return TrainConfig(
        **(
            {
                "output_dir": name,  # relative: state.json keeps it
                "overwrite": True,
                "batch_size": 4,
                "max_length": 24,
                "max_steps": 4,
                "checkpoint_every": 2,
                "log_every": 1,
                "lr": 0.02,
                "plot": False,
                "progress": False,
            }
            | values
        )
    )


def model() -> tuple[LlamaAdapter, Any]:
    llama, tokenizer = load_backbone(GOLDEN / "backbone")
    torch.manual_seed(1)
    return LlamaAdapter(llama, AdapterConfig(adapter_dim=2, layers=[-1], init="xavier")), tokenizer


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    os.chdir(GOLDEN)
    backbone()
    rows()
    colors, texts, questions = (f"{n}.jsonl" for n in ("colors", "texts", "questions"))
    expected: dict[str, dict[str, float]] = {}

    def note(name: str, metrics: dict[str, float]) -> None:
        left_out = ("seconds", "tokens_per_second")
        expected[name] = {key: value for key, value in metrics.items() if not key.endswith(left_out)}

    def run(
        name: str, data: Any, recipe: Any, adapted: LlamaAdapter, tokenizer: Any, where: Any, **values: Any
    ) -> None:
        made = config(name, **values)
        train(adapted, data, made, tokenizer=tokenizer, task=recipe)
        note(name, evaluate(adapted, data, made, tokenizer=tokenizer, task=recipe))
        for folder, file in where.items():
            save_sources(GOLDEN / name / folder, Sources("backbone", None, "fp32", file))

    adapted, tokenizer = model()
    made = config("classification")
    head = train(adapted, colors, made, tokenizer=tokenizer).head
    note("classification", evaluate(adapted, colors, made, tokenizer=tokenizer, head=head))
    save_sources(GOLDEN / "classification", Sources("backbone", None, "fp32", "colors.jsonl"))

    adapted, tokenizer = model()
    made = config("causal-lm", task="causal-lm", max_norm=math.inf)
    train(adapted, texts, made, tokenizer=tokenizer)
    note("causal-lm", evaluate(adapted, texts, made, tokenizer=tokenizer))
    save_sources(GOLDEN / "causal-lm", Sources("backbone", None, "fp32", "texts.jsonl"))

    adapted, tokenizer = model()
    routing = RoutingConfig(experts=2)
    run("routing", colors, RoutedTask(adapted, routing), adapted, tokenizer, {"": "colors.jsonl"})

    adapted, tokenizer = model()
    adapted.add_adapter("small", AdapterConfig(adapter_dim=1, layers=[0]))
    mixed = MultiTask(adapted, ["default", "small"], temperature=2.0)
    where = {"tasks/default": "colors.jsonl", "tasks/small": "colors.jsonl"}
    run("multitask", {"default": colors, "small": colors}, mixed, adapted, tokenizer, where)

    adapted, tokenizer = model()
    taught = Distillation(adapted, temperature=2.0, divergence="js")
    run("distillation", texts, taught, adapted, tokenizer, {"": "texts.jsonl"}, task="causal-lm")

    adapted, tokenizer = model()
    keeping = KeepBehaviour(adapted, weight=0.3)
    run("keeping", WithKept(colors, texts), keeping, adapted, tokenizer, {"": "colors.jsonl"})

    adapted, tokenizer = model()
    asked = QuestionAnswering(adapted, SpanSettings(doc_stride=4, pointer_dim=2, null_threshold=1.0))
    run("qa", questions, asked, adapted, tokenizer, {"": "questions.jsonl"}, max_length=44)

    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main()
