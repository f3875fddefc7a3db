"""A byte-level tokenizer, a tiny LLaMA for it, and questions of our own in SQuAD's format."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adapterkern as ak
from adapterkern.recipes.qa import QuestionAnswering, SpanSettings
from adapterkern.recipes.qa.squad import Question, read_questions
from adapterkern.training import train
from adapterkern.training.data.rows import BadRows
from tests.support import tiny_run

EXAMPLES = Path(__file__).with_name("qa_examples.json")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as LLaMA 3 and SmolLM2 have: a character beyond ASCII can be several tokens."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    core.train_from_iterator([text for q in examples() for text in (q.context, q.question)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def examples() -> list[Question]:
    return read_questions(EXAMPLES, BadRows("examples"))


TOKENIZER = byte_level_tokenizer()


def model(**adapter: Any) -> ak.LlamaAdapter:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return ak.LlamaAdapter(
        LlamaForCausalLM(config), ak.AdapterConfig(**({"adapter_dim": 16, "layers": (1, 2)} | adapter))
    )


def quiet(**values: Any) -> ak.TrainConfig:
    return tiny_run.quiet(**({"max_length": 128, "batch_size": 8} | values))


def row(context: str, start: int, end: int, question: str = "Which?") -> dict[str, Any]:
    answers = [{"text": context[start:end], "answer_start": start}]
    return {"id": "q", "question": question, "context": context, "answers": answers}


def shared_run(**values: Any) -> tuple[list[float], dict[str, float] | None]:
    """Losses of three steps of 4 windows in forwards of 2, and the metrics after them."""
    adapted = model()
    config = quiet(batch_size=2, accumulation=2, max_steps=3, log_every=1, **values)
    task = QuestionAnswering(adapted, SpanSettings(pointer_dim=8))
    result = train(adapted, EXAMPLES, config, tokenizer=TOKENIZER, eval_data=EXAMPLES, task=task)
    return [record["loss"] for record in result.history if record["kind"] == "train"], result.metrics
