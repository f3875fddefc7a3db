"""A LLaMA of 4 layers and 32 channels with random weights, a word-level tokenizer, and texts with a rule to learn."""

import random
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapterkern.model.config import AdapterConfig
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import TrainConfig

WORDS = [f"w{i}" for i in range(100)]
VOCABULARY = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: i for i, word in enumerate(WORDS, start=3)}


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def model(seed: int = 0, **adapter: Any) -> LlamaAdapter:
    """Adapters after layers 2 and 3 of 4, unless told otherwise: a prefix of 3 layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaAdapter(LlamaForCausalLM(config), AdapterConfig(**({"adapter_dim": 8, "layers": (2, 3)} | adapter)))


def rows(count: int, seed: int = 0, low: int = 4, high: int = 12) -> list[dict[str, Any]]:
    """Words drawn at random, never the last; the label says which of two others stands at three places among them."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        words = draw.choices(WORDS[2:-1], k=draw.randint(low, high))
        label = draw.randrange(2)
        for _ in range(3):
            words.insert(draw.randrange(len(words) + 1), WORDS[label])
        made.append({"text": " ".join(words), "label": ("no", "yes")[label]})
    return made


def quiet(**values: Any) -> TrainConfig:
    """A configuration for tests: small batches, nothing shown."""
    return TrainConfig(
        **({"progress": False, "plot": False, "max_length": 16, "batch_size": 4, "epochs": 2, "lr": 1e-2} | values)
    )


def weights(adapted: LlamaAdapter | None, head: torch.nn.Module | None = None) -> list[Tensor]:
    """Copies of everything that is trained."""
    adapters = [] if adapted is None else adapted.adapter_parameters()
    return [p.detach().clone() for p in (*adapters, *(head.parameters() if head is not None else ()))]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
