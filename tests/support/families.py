"""A tiny random decoder of every causal language model that transformers has, and what adapterkern supports of each.

``python -m tests.support.families`` prints the tables of docs/families.md.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import adapterkern as ak
from adapterkern.model.asking import check_runs
from adapterkern.model.decoder import check_attention_site, text_decoder
from adapterkern.training.data.examples import load_examples
from adapterkern.training.data.padding import check_padding
from tests.support import tiny_run

VERSION = "5.23"
LISTED = pytest.mark.skipif(
    not transformers.__version__.startswith(f"{VERSION}."), reason=f"docs/families.md is about transformers {VERSION}"
)
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(1))
LENGTHS = (12, 9, 5)  # the real tokens of each row

# A configuration gets those of these fields that it has.
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "sliding_window": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,  # more than any row has: where the choice is between equal scores, the batch's shape decides
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "ssm_state_size": 8,
    "use_mamba_kernels": False,
    # positions that count: the first length at which they do
    "floor_scale": 4,
    "attention_chunk_size": 8,
    # no random numbers in training
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "dropout": 0.0,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}

_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_SLIDING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4}
# What some need besides, by the name of the family.
FIXES: dict[str, dict[str, Any]] = {
    "BailingHybrid": {"layer_group_size": 2},
    "Bamba": {"attn_layer_indices": [1, 3]},
    "CohereCompass": {
        "logit_scale": 0.25,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE | {"mrope_section": [2, 1, 1]}),
    },
    "Dbrx": {"attn_config": {"rope_theta": 10_000.0}},
    "DeepseekV4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "head_dim": 16},
    "Dots1": {"n_shared_experts": 1},
    "Dots3Note": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "head_dim": 16,
        "shared_experts_intermediate_size": 16,
    },
    "FalconH1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "Gemma3n": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8},
    "Gemma4": {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8},
    "GraniteMoeHybrid": _HYBRID | {"num_local_experts": 0},
    "Inkling": _SLIDING,
    "Inkling2": _SLIDING,
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinear": _HYBRID,
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"] * 2},
    "LongcatFlash": {"num_layers": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48},
    "MiniMaxM3VL": {"dense_intermediate_size": 48, "shared_intermediate_size": 16},
    "Ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 4,
        }
    },
    "Mllama": {"cross_attention_layers": [2]},
    "Moshi": {"ffn_dim": 64},
    "NemotronH": {"layers_block_type": ["mamba", "attention"] * 2, "n_groups": 1},
    "Mamba2": {"num_heads": 8},
    "Phi4Multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "Qwen4Exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "Reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16]},
    "XGLM": {"d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4},
    "Zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "Zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "Zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def families() -> list[str]:
    """The classes of transformers' causal language models, in its order."""
    listed = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return list(dict.fromkeys(name for entry in listed for name in ([entry] if isinstance(entry, str) else entry)))


def short(name: str) -> str:
    """The family's name without what its class does."""
    return re.sub("(ForCausalLM|LMHeadModel|ModelWithLMHead|WithLMHeadModel|ForConditionalGeneration)$", "", name)


def tiny(name: str, **changes: Any) -> Any:
    """The model of the class ``name``, with random weights, in eval mode; on the meta device if it has no layers.

    Raises:
        ImportError: transformers needs another package for it.
    """
    if changes:
        return _built(name, changes)
    built, drawn = _kept(name, torch.get_default_dtype())
    torch.set_rng_state(drawn)
    return copy.deepcopy(built)


@functools.lru_cache(maxsize=1)  # a test asks for one family a dozen times
def _kept(name: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """A model to be copied, and the state of the random numbers after its weights."""
    return _built(name, {}), torch.get_rng_state()


def _built(name: str, changes: dict[str, Any]) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    config = tiny_config(cls.config_class, short(name), changes)
    with torch.device("meta"):
        model = cls(config)
    if not hasattr(getattr(model, "model", None), "layers"):
        return model.eval()
    torch.manual_seed(0)
    return cls(config).eval()


def tiny_config(cls: Any, family: str, changes: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    fields = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has as many keys as queries
        fields["num_key_value_heads"] = 4
    return cls(**(fields | FIXES.get(family, {}) | changes))


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded on this side."""
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, n in enumerate(LENGTHS):
        real = slice(0, n) if side == "right" else slice(IDS.shape[1] - n, None)
        ids[row, real], mask[row, real] = IDS[row, :n], 1
    return ids, mask


def adapted(name: str) -> ak.LlamaAdapter:
    """A tiny model with adapters after its second and its last layer, which do something."""
    llama = tiny(name)
    layers = getattr(getattr(llama, "model", None), "layers", None)
    layers = None if layers is None else [1, len(layers) - 1]
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=4, layers=layers)).eval()
    draw(model)
    return model


def draw(model: ak.LlamaAdapter, name: str | None = None) -> None:
    """Draw an adapter's parameters anew."""
    torch.manual_seed(5)
    for p in model.adapter_parameters(name):
        nn.init.normal_(p, std=0.2)


BESIDE = "`model.language_model.layers`"  # in a model that also reads images, or sounds


class Found(NamedTuple):
    """What adapterkern supports of a family."""

    plain_logits: bool  # the output embeddings are all that makes them
    left_padding: bool
    prefix_cache: bool
    adapter_names: bool
    attention: bool | None  # position="attention"; None: in some of its layers
    fuse_norm: bool | None  # None: at some of its sites


def find(name: str) -> Found | str:
    """What is supported of the class ``name``, found by running it; or why it is refused."""
    try:
        tiny(name)
    except ImportError:
        return "transformers needs another package to build it"
    except Exception:  # of their own kinds: its configuration is checked against another one
        return "transformers cannot build it without another model's configuration"
    decoder = text_decoder(model := tiny(name))
    if decoder is not getattr(model, "model", None) and hasattr(decoder, "layers"):
        return BESIDE
    try:
        model = adapted(name)
    except TypeError as error:
        if "a transformers decoder of LLaMA's structure" not in str(error):
            raise
        return "no `model.layers`"
    try:
        check_runs(model)
    except ValueError as error:
        channels = re.search(r"whose pass on (\d+)", str(error))
        if channels is None:
            raise
        return f"its layers pass on several streams as one, of {channels[1]} channels for {model.config.hidden_size}"
    rows = [{"input_ids": row[:n].tolist()} for row, n in zip(IDS, LENGTHS, strict=True)]
    left = tiny_run.quiet(task="causal-lm", padding_side="left")
    examples = load_examples(rows, left)[0]
    path = model.logits_path
    assert not path.obstacle
    names = ["default", "__base__", "default"]
    return Found(
        plain_logits=path.plain,
        left_padding=_accepts(lambda: check_padding(model.base, left, examples)),
        prefix_cache=not model.reuse_obstacle(IDS.shape[1]),
        adapter_names=_accepts(lambda: model(input_ids=IDS, adapter_names=names, use_cache=False)),
        attention={(True,): True, (False,): False}.get(tuple(sites := has_sites(model.base))),
        fuse_norm=_fuses(model, len(model.layers) * (1 + (True in sites))),
    )


def has_sites(llama: Any) -> set[bool]:
    """Whether the layers have a place between attention and feed-forward network."""
    return {_accepts(functools.partial(check_attention_site, layer)) for layer in llama.model.layers}


def _fuses(model: ak.LlamaAdapter, sites: int) -> bool | None:
    """Whether an RMSNorm reads what adapters at all ``sites`` leave; None: at some."""
    try:
        model.fuse_norm = True
    except ValueError:
        return False
    return True if len(model._next_norms) == sites else None


def _accepts(call: Callable[[], Any]) -> bool:
    try:
        call()
    except ValueError:
        return False
    return True


_YES = {True: "yes", False: "no", None: "some layers"}
_LOGITS = {True: "output embeddings", False: "its forward"}


def row(name: str, found: Found | str) -> str:
    """A row of one of the page's tables."""
    if isinstance(found, str):
        return f"| `{name}` | {found} |"
    cells = [_LOGITS[found.plain_logits], *(_YES[value] for value in found[1:])]
    return f"| `{name}` | {' | '.join(cells)} |"


def documented() -> dict[str, str]:
    """The rows of the page's tables, by class."""
    return {match[1]: match[0] for match in re.finditer(r"^\| `(\w+)` \|.*$", PAGE.read_text(), re.MULTILINE)}


def print_tables() -> None:
    found = {name: find(name) for name in families()}
    beside = {name for name, what in found.items() if what == BESIDE}
    refused = {name for name, what in found.items() if isinstance(what, str)} - beside
    supported = found.keys() - beside - refused
    print('| Class | Logits | Left padding | Prefix cache | `adapter_names` | `position="attention"` | `fuse_norm` |')
    print("|---|---|---|---|---|---|---|")
    print(*(row(name, what) for name, what in found.items() if name in supported), sep="\n")
    print("\n| Class | Layers |\n|---|---|")
    print(*(row(name, what) for name, what in found.items() if name in beside), sep="\n")
    print("\n| Class | Refused because |\n|---|---|")
    print(*(row(name, what) for name, what in found.items() if name in refused), sep="\n")


if __name__ == "__main__":
    print_tables()
