"""A whole training step: what adapters cost beside the frozen backbone, and what the alternatives cost.

The adapter tax is a variant's step time over that of the frozen backbone, whose backward runs to the same depth: from
the loss to the output of the first adapted layer. LoRA (PEFT) is on every projection of the adapted layers, with the
rank whose number of parameters is closest. AdapterHub's library runs in its own environment and process and takes its
turn in the same rounds.
"""

import contextlib
import copy
import dataclasses
import gc
import importlib.util
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.model.config import adapter_num_params
from adapterkern.model.fast_dtype import fast_dtype
from adapterkern.model.liger import use_liger
from adapterkern.training.attention import LONGEST, written_out_is_faster
from bench.cases import Case, Variant, error_budget, relative_error
from bench.llama_step import Step, StepSpec, make_llama
from bench.measure import kept_for_backward

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SMOLLM2 = (576, 1536, 30, 9, 3, 49152)
LLAMA_1B = (2048, 8192, 16, 32, 8, 128256)
LLAMA_7B = (4096, 11008, 32, 32, 32, 32000)
LLAMA_8B = (4096, 14336, 32, 32, 8, 128256)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FROZEN, EAGER, OURS, NORMED, CACHED, OURS_LIGER, LORA, LIGER, HUB = (
    "frozen backbone", "eager adapters", "ours", "ours + fuse_norm", "ours + prefix cache", "ours + Liger", "PEFT LoRA",
    "PEFT LoRA + Liger", "AdapterHub adapters",
)  # fmt: skip
_ON_COPIES = {NORMED: {"fuse_norm": True}, OURS_LIGER: {"liger": True}}  # they change the classes of modules
SAME = 1e-4  # budget in fp32: eager's function, summed in another order


def cases(device: torch.device, quick: bool) -> list[Case]:
    """On a CPU the first layers of SmolLM2-135M; on a GPU those of four LLaMAs that fit."""
    if device.type == "cpu":
        shape = (*SMOLLM2[:2], 8, *SMOLLM2[3:])
        batch = (4, 48) if quick else (16, 48)
        # bf16 as well where the commands choose it
        dtypes = ("float32",) if quick or fast_dtype(device)[0] == "fp32" else ("float32", "bfloat16")
        late = "SmolLM2-135M, first 8 layers, adapters on the last 3"
        made = [step_case(late, shape, (5, 6, 7), batch, device, dtype) for dtype in dtypes]
        if quick:
            return made
        long, shape = "SmolLM2-135M, first 4 layers, every 2nd adapted", (*shape[:2], 4, *shape[3:])
        return made + [step_case(long, shape, (1, 3), (16, 256), device, dtype) for dtype in dtypes]
    free = torch.cuda.mem_get_info(device)[0]
    # what is published comes first, so that a stopped run has it
    models = {"LLaMA-7B": LLAMA_7B, "LLaMA-8B": LLAMA_8B, "LLaMA-1B": LLAMA_1B, "SmolLM2-135M": SMOLLM2}
    made = []
    for name, shape in models.items():
        sites = tuple(range(1, shape[2], 2))
        case = step_case(
            f"{name}, every 2nd layer adapted", shape, sites, (4, 1024), device, "bfloat16", classify=False
        )
        # room for the bf16 weights, once more in fp32 for the reference or in AdapterHub's process, and activations
        if 3.5 * 2 * backbone_params(case.shape) < free:
            made.append(case)
    return made[-1:] if quick else made


def step_case(
    name: str,
    shape: tuple[int, ...],
    sites: tuple[int, ...],
    batch: tuple[int, int],
    device: torch.device,
    dtype: str = "float32",
    classify: bool = True,
) -> Case:
    """A step on a LLaMA of ``shape`` (as SMOLLM2), adapters after the layers ``sites``, ``batch`` = (rows, tokens)."""
    hidden, intermediate, num_layers, heads, kv_heads, vocabulary = shape
    spec = StepSpec(
        hidden, intermediate, num_layers, heads, kv_heads, vocabulary, sites, 64, *batch, dtype, classify, str(device),
        torch.get_num_threads(), _written_out(device, batch[1], heads, hidden // heads, dtype),
    )  # fmt: skip
    s = dataclasses.asdict(spec)
    # two FLOPs per weight and token forward, and two more backward above the first adapter
    layers, head = backbone_params(s) - 2 * s["vocab_size"] * s["hidden_size"], s["vocab_size"] * s["hidden_size"]
    above = 1 - (sites[0] + 1) / spec.num_hidden_layers
    flops = 2 * spec.tokens * (layers * (1 + above) + (0 if classify else 2 * head))
    return Case("step", f"{name}, {batch[0]}×{batch[1]} tokens, {dtype}", s, flops=int(flops), wall=True)


def _written_out(device: torch.device, length: int, heads: int, size: int, dtype: str) -> bool:
    """Whether ``train`` would write attention out; every variant then does."""
    short = device.type == "cpu" and dtype != "float32" and length <= LONGEST
    return short and written_out_is_faster(heads, size, getattr(torch, dtype), torch.get_num_threads())


def backbone_params(s: Any) -> int:
    d, kv = s["hidden_size"], s["hidden_size"] * s["num_key_value_heads"] // s["num_attention_heads"]
    layer = 2 * d * d + 2 * d * kv + 3 * d * s["intermediate_size"] + 2 * d
    return s["num_hidden_layers"] * layer + 2 * s["vocab_size"] * d


def names(case: Case, device: torch.device) -> list[str]:
    """The names of the variants, the baseline first."""
    if device.type == "cpu":  # Liger's kernels need a GPU
        return [FROZEN, EAGER, OURS, NORMED, CACHED, LORA, HUB]
    return [FROZEN, EAGER, OURS, NORMED, CACHED, OURS_LIGER, LORA, LIGER, HUB]


def build(case: Case, device: torch.device, wanted: Sequence[str], peer_python: str | None) -> list[Variant]:
    """The variants ``wanted`` over one backbone; copies of its modules share the weights."""
    spec = StepSpec(**case.shape)
    llama = make_llama(spec)
    shared = {id(p): p for p in llama.parameters()}
    # before LlamaAdapter changes the layers
    copies = {name: copy.deepcopy(llama, dict(shared)) for name in (*_ON_COPIES, LORA, LIGER) if name in wanted}
    exact = None if spec.dtype == "float32" else copy.deepcopy(llama).float()
    sites = ak.AdapterConfig(adapter_dim=spec.adapter_dim, layers=spec.sites, init="xavier")
    model = ak.LlamaAdapter(llama, sites)
    model.add_adapter("eager", sites)
    model.adapters["eager"].load_state_dict(model.adapters["default"].state_dict())

    def forward(adapter: str, fused: bool) -> Callable[[Tensor], Tensor]:
        def hidden_states(ids: Tensor) -> Tensor:
            model.set_adapter(adapter)
            model.fused = fused
            return model.decoder(input_ids=ids, use_cache=False).last_hidden_state

        return hidden_states

    def frozen(ids: Tensor) -> Tensor:
        with model.disable_adapter(), gradient_from(model.layers[spec.sites[0]]):
            return model.decoder(input_ids=ids, use_cache=False).last_hidden_state

    ours, eager = (model.adapter_parameters(name) for name in ("default", "eager"))
    plain = Step(spec, llama, forward("eager", False), eager)
    reference, eagers, budget = _gradients(plain), None, SAME
    if exact is not None:
        rounded, reference = reference, _exact_gradients(spec, exact, model)
        exact = None
        gc.collect()  # it is in a cycle
        eagers = relative_error(rounded, reference)
        budget = error_budget(eagers, getattr(torch, spec.dtype))

    def on_backbone(name: str) -> Variant:
        if name == FROZEN:
            return variant(name, Step(spec, llama, frozen, []), None, spec)
        if name == EAGER:
            return variant(name, plain, eagers, spec, budget)
        step = Step(spec, llama, forward("default", True), ours, clipped_adamw)
        if name == CACHED:
            prefix = model.run_prefix(step.input_ids).cpu()  # where training keeps it
            step = Step(spec, llama, lambda ids: model.run_suffix(prefix.to(device)), ours, clipped_adamw)
        model.set_adapter("default")
        return variant(name, step, relative_error(_gradients(step), reference), spec, budget)

    def made(name: str) -> Variant:
        if name == HUB:
            return _adapterhub(spec, peer_python)
        if name in (OURS_LIGER, LIGER) and importlib.util.find_spec("liger_kernel") is None:
            return Variant(name, missing="liger-kernel is not installed")
        if name in _ON_COPIES:
            own = _adapted(copies[name], model, **_ON_COPIES[name])
            step = Step(spec, copies[name], of_decoder(own), own.adapter_parameters(), clipped_adamw)
            return variant(name, step, relative_error(_gradients(step), reference), spec, budget)
        return _lora(name, spec, copies[name]) if name in copies else on_backbone(name)

    variants = []
    for name in wanted:
        try:
            variants.append(made(name))
        except Exception as error:
            variants.append(Variant.broken(name, error))
    return variants


def clipped_adamw(parameters: list[Tensor]) -> Callable[[], object]:
    return ak.ClippedAdamW(parameters, lr=1e-4, max_norm=1.0).step


@contextlib.contextmanager
def gradient_from(layer: torch.nn.Module) -> Iterator[None]:
    """Stop the backward at this layer's output, as if its adapter were the first."""
    hook = layer.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        hook.remove()


def _exact_gradients(spec: StepSpec, llama: Any, trained: ak.LlamaAdapter) -> Tensor:
    """The gradients in fp32, of a backbone that is converted to it, row by row: all rows may not fit."""
    model = _adapted(llama, trained)
    model.fused = False
    return _gradients(Step(spec, llama, of_decoder(model), model.adapter_parameters()), spec.batch)


def _gradients(step: Step, parts: int = 1) -> Tensor:
    """All gradients of one backward, including the head's, concatenated."""
    for rows in torch.arange(step.spec.batch).chunk(parts):
        (step.loss(slice(int(rows[0]), int(rows[-1]) + 1)) / parts).backward()
    flat = torch.cat([p.grad.flatten() for p in step.trained])
    for p in step.trained:
        p.grad = None
    return flat


def variant(name: str, step: Step, error: float | None, spec: StepSpec, budget: float | None = None) -> Variant:
    info = {
        "tokens": spec.tokens,
        "trainable": sum(p.numel() for p in step.parameters),
        # held before a step, without the other variants: the backbone, and what is trained with AdamW's two moments
        # and, between the batches of one update, their gradients; the model's peak is this plus `peak_bytes`
        "model_bytes": backbone_params(dataclasses.asdict(spec)) * getattr(torch, spec.dtype).itemsize
        + (3 + (spec.accumulate > 1)) * sum(p.nbytes for p in step.trained),
        **kept_for_backward(step.loss, [*step.llama.parameters(), *step.trained]),
    }
    return Variant(name, step, error, None if error is None else budget, info)


def _adapted(llama: Any, like: ak.LlamaAdapter, **flags: bool) -> ak.LlamaAdapter:
    """Another backbone with a copy of the default adapter of ``like``."""
    model = ak.LlamaAdapter(llama, like.adapter_config("default"), **flags)
    model.adapters["default"].load_state_dict(like.adapters["default"].state_dict())
    return model


def of_decoder(model: ak.LlamaAdapter) -> Callable[[Tensor], Tensor]:
    def hidden_states(ids: Tensor) -> Tensor:
        return model.decoder(input_ids=ids, use_cache=False).last_hidden_state

    return hidden_states


def _lora(name: str, spec: StepSpec, llama: Any) -> Variant:
    if importlib.util.find_spec("peft") is None:
        return Variant(name, missing="peft is not installed")
    import peft

    if name == LIGER:
        use_liger(llama)  # Liger's own function would change every other variant's rotations, too
    wanted = adapter_num_params(spec.hidden_size, spec.adapter_dim)
    layer = llama.model.layers[0]
    per_rank = sum(
        m.in_features + m.out_features for name, m in layer.named_modules() if name.split(".")[-1] in PROJECTIONS
    )
    rank = max(1, round(wanted / per_rank))
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), layers_to_transform=list(spec.sites)
    )
    lora: Any = peft.get_peft_model(llama, config)
    trained = [p for p in lora.parameters() if p.requires_grad]
    step = Step(spec, llama, lambda ids: llama.model(input_ids=ids, use_cache=False).last_hidden_state, trained)
    made = variant(name, step, None, spec)
    made.info["rank"] = rank
    return made


def _adapterhub(spec: StepSpec, python: str | None) -> Variant:
    if python is None:
        return Variant(HUB, missing="no --peer-python: see bench/peers/adapters.txt")
    command = [python, "-m", "bench.peers.adapterhub", json.dumps(dataclasses.asdict(spec))]
    root = Path(__file__).parent.parent
    worker = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None
    assert worker.stdout is not None
    requests, replies = worker.stdin, worker.stdout
    first = replies.readline()
    if not first:
        raise RuntimeError(f"{python} -m bench.peers.adapterhub ended with {worker.wait()} before its first step")

    def clock() -> float:
        requests.write("\n")
        requests.flush()
        return float(replies.readline())

    def close() -> None:
        requests.close()
        worker.wait()

    return Variant(HUB, info={"tokens": spec.tokens} | json.loads(first), clock=clock, close=close)
