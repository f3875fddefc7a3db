"""What a LLaMA-7B costs per iteration, by LitGPT's protocol: gigabytes, and minutes per 1,000 iterations.

LitGPT's table (``published.py``) is of finetune/adapter.py, adapter_v2.py and lora.py on Alpaca, on one card:

- everything in bf16, no recomputation; AdamW without clipping after every 128 texts, in micro-batches of 1, 2 or 4;
- the first micro-batch has the longest text, 1,304 tokens; the others are as long as their longest text, of a data set
  whose median is 110 tokens (tutorials/oom.md). So its gigabytes, the most that the allocator gave out, are those of
  1,304 tokens, and its minutes are those of short texts.

Here every case has one length: 1,304 tokens for the memory, whose time no iteration exceeds, and 110 tokens for the
time. An iteration is a forward and a backward of a micro-batch; the update's time, measured on its own, is shared by
the iterations before it. All rows clip here, and all but PEFT's AdaptionPrompt keep in fp32 what is trained, which
LitGPT has in bf16. Adapters are as wide as LoRA's number of parameters allows; prompts are LitGPT's.
"""

import copy
import dataclasses
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.model.config import largest_adapter_dim
from bench import published
from bench.cases import Case, Variant
from bench.llama_step import Step, StepSpec, make_llama
from bench.measure import timer
from bench.report import LONGEST
from bench.step import (
    EAGER,
    FROZEN,
    LLAMA_7B,
    LORA,
    OURS,
    OURS_LIGER,
    backbone_params,
    clipped_adamw,
    gradient_from,
    of_decoder,
    step_case,
    variant,
)

TINY = (64, 128, 4, 4, 2, 256)  # a rehearsal's shape
TEXTS = 128  # per update
MICRO_BATCHES = (1, 2, 4)
MEDIAN = 110  # tokens of Alpaca's texts, by Llama 2's tokenizer; the longest has 1,304
RANK = 8  # of LitGPT's LoRA, on the projections of queries and values
PROMPT_LENGTH, PROMPTS_FROM = 10, 2  # of LitGPT's adapters: their embeddings, and their first layer
PROMPTS, PEFT_PROMPTS, V2 = "ours, gated prompts", "PEFT AdaptionPrompt", "ours, LLaMA-Adapter V2"
OUT_OF_MEMORY = "out of memory"


def cases(device: torch.device, quick: bool) -> list[Case]:
    """LLaMA-7B on a GPU that has room for it; ``quick``: a tiny LLaMA on any device, as a rehearsal."""
    if quick:
        dtype = "float32" if device.type == "cpu" else "bfloat16"
        return [_case("tiny LLaMA", TINY, 2, length, device, dtype) for length in (24, 8)]
    whole = of_7b(device)
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return whole if room > 1.4 * 2 * backbone_params(whole[0].shape) else []


def of_7b(device: torch.device) -> list[Case]:
    """LitGPT's cases, the shortest time first."""
    return [
        _case("LLaMA-7B", LLAMA_7B, micro_batch, length, device, "bfloat16")
        for micro_batch in MICRO_BATCHES
        for length in (LONGEST, MEDIAN)
    ]


def _case(name: str, shape: tuple[int, ...], micro_batch: int, length: int, device: torch.device, dtype: str) -> Case:
    """The adapters are on every second layer, as wide as LoRA's number of parameters allows."""
    hidden, _, num_layers, heads, kv_heads, _ = shape
    sites = tuple(range(1, num_layers, 2))
    lora = num_layers * RANK * (3 * hidden + hidden * kv_heads // heads)
    made = step_case(name, shape, sites, (micro_batch, length), device, dtype, classify=False)
    sized = {"adapter_dim": largest_adapter_dim(hidden, len(sites), lora), "accumulate": TEXTS // micro_batch}
    return dataclasses.replace(made, part="cost", shape={**made.shape, **sized})


def names(case: Case, device: torch.device) -> list[str]:
    """The names of the variants, the baseline first."""
    liger = [] if device.type == "cpu" else [OURS_LIGER]  # Liger's kernels need a GPU
    return [FROZEN, EAGER, OURS, *liger, PROMPTS, V2, LORA, PEFT_PROMPTS]


def build(case: Case, device: torch.device, wanted: Sequence[str]) -> list[Variant]:
    """The variants ``wanted``, each on a copy of the backbone's modules that shares its weights."""
    spec = StepSpec(**case.shape)
    llama = make_llama(spec)
    shared = {id(p): p for p in llama.parameters()}
    variants = []
    for name in wanted:
        try:
            variants.append(_tried(name, spec, _STEPS[name](spec, copy.deepcopy(llama, dict(shared)))))
        except torch.OutOfMemoryError:  # as in LitGPT's table, a result
            variants.append(Variant(name, missing=OUT_OF_MEMORY))
        except ModuleNotFoundError as error:
            variants.append(Variant(name, missing=f"{error.name} is not installed"))
        except Exception as error:
            variants.append(Variant.broken(name, error))
    return variants


def _tried(name: str, spec: StepSpec, step: Step) -> Variant:
    """The variant of a step that has run once and left no parameter without a gradient."""
    step()
    if idle := sum(p.grad is None for p in step.trained):
        raise RuntimeError(f"expected a gradient of all {len(step.trained)} parameters, got none of {idle}")
    made = variant(name, step, None, spec)
    clock = timer(torch.device(spec.device), wall=True)
    made.info["update_seconds"] = statistics.median(clock(step.update) for _ in range(3)) if step.trained else 0.0
    made.info["published"] = [dataclasses.asdict(row) for row in published.of_litgpt(spec.batch)]
    return made


# From the shape and a backbone of its own to a step


def _frozen(spec: StepSpec, llama: Any) -> Step:
    def hidden_states(ids: Tensor) -> Tensor:
        with gradient_from(llama.model.layers[spec.sites[0]]):
            return llama.model(input_ids=ids, use_cache=False).last_hidden_state

    return Step(spec, llama, hidden_states, [])


def _ours(config: Callable[[StepSpec], ak.AdapterConfig], **how: bool) -> Callable[[StepSpec, Any], Step]:
    def made(spec: StepSpec, llama: Any) -> Step:
        if how.get("liger") and importlib.util.find_spec("liger_kernel") is None:
            raise ModuleNotFoundError(name="liger-kernel")
        model = ak.LlamaAdapter(llama, config(spec), **how)
        return Step(spec, llama, of_decoder(model), model.adapter_parameters(), clipped_adamw)

    return made


def _bottlenecks(spec: StepSpec) -> ak.AdapterConfig:
    return ak.AdapterConfig(adapter_dim=spec.adapter_dim, layers=spec.sites)


def _prompts(spec: StepSpec) -> ak.AdapterConfig:
    layers = tuple(range(PROMPTS_FROM, spec.num_hidden_layers))
    return ak.AdapterConfig(kind="prompt", prompt_length=PROMPT_LENGTH, prompt_gate="head", layers=layers)


def _v2(spec: StepSpec) -> ak.AdapterConfig:
    """In all layers, since biases and scales are only where prompts are; LitGPT's LM head has them too."""
    norms = ["input_layernorm", "post_attention_layernorm", "norm"]
    more: dict[str, Any] = {"bias_scale": True, "modules_to_save": norms}
    return ak.AdapterConfig(kind="prompt", prompt_length=PROMPT_LENGTH, prompt_gate="head", **more)


def _peft(config: Callable[[Any, StepSpec], Any]) -> Callable[[StepSpec, Any], Step]:
    def made(spec: StepSpec, llama: Any) -> Step:
        import peft

        model: Any = peft.get_peft_model(llama, config(peft, spec))
        trained = [p for p in model.parameters() if p.requires_grad]
        return Step(spec, llama, lambda ids: llama.model(input_ids=ids, use_cache=False).last_hidden_state, trained)

    return made


def _lora(peft: Any, spec: StepSpec) -> Any:
    return peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])


def _adaption_prompt(peft: Any, spec: StepSpec) -> Any:
    layers = spec.num_hidden_layers - PROMPTS_FROM
    return peft.AdaptionPromptConfig(adapter_len=PROMPT_LENGTH, adapter_layers=layers, task_type="CAUSAL_LM")


_STEPS: dict[str, Callable[[StepSpec, Any], Step]] = {
    FROZEN: _frozen,
    EAGER: _ours(_bottlenecks, fused=False),
    OURS: _ours(_bottlenecks),
    OURS_LIGER: _ours(_bottlenecks, liger=True),
    PROMPTS: _ours(_prompts),
    V2: _ours(_v2),
    LORA: _peft(_lora),
    PEFT_PROMPTS: _peft(_adaption_prompt),
}
