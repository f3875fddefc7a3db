"""One clipped AdamW step, ours against what PyTorch users write.

The floor is 28 bytes per parameter: p, g, m, v read; p, m, v written, all fp32. The error is that of the update of
three steps against fp64, relative; most of it is the rounding of the parameters.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import adapterkern as ak
from bench.cases import Case, Variant, error_budget, relative_error

FLOOR_BYTES, FLOPS = 28, 18  # per parameter
LR = 1e-3
ADAPTER = (4096, 4096, 64 * 4096, 64, 4096 * 64, 4096)  # norm, down, up of one adapter: d = 4096, r = 64
LORA_QV = (8 * 4096, 4096 * 8, 8 * 4096, 1024 * 8)
LORA_ALL = tuple(
    16 * n for pair in [(4096, 4096), (4096, 1024)] * 2 + [(4096, 14336)] * 2 + [(14336, 4096)] for n in pair
)
SETS = {
    "16 adapters, LLaMA-7B": ADAPTER * 16,
    "LoRA r=8 on q and v, LLaMA-3-8B": LORA_QV * 32,
    "LoRA r=16 on 7 projections, LLaMA-3-8B": LORA_ALL * 32,
    "1 adapter": ADAPTER,  # for rehearsals
}
# other optimizers for a GPU: module, class
OTHERS = {
    "clip + Apex FusedAdam": ("apex.optimizers", "FusedAdam"),
    "clip + TransformerEngine FusedAdam": ("transformer_engine.pytorch.optimizers", "FusedAdam"),
    "clip + bitsandbytes AdamW": ("bitsandbytes.optim", "AdamW32bit"),
}
Step = Callable[[], object]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """One case per set of parameters; a quick run takes the first."""
    return [set_case(name) for name in list(SETS)[: 1 if quick else 3]]


def set_case(name: str) -> Case:
    """The case of one of SETS."""
    sizes = SETS[name]
    n = sum(sizes)
    title = f"{name}: {len(sizes)} tensors, {n / 1e6:.2f} M fp32 parameters"
    shape = {"set": name, "tensors": len(sizes), "parameters": n}
    return Case("optimizer", title, shape, FLOOR_BYTES * n, FLOPS * n)


def names(case: Case, device: torch.device) -> list[str]:
    """The names of the variants, the baseline first."""
    others = list(OTHERS) if device.type == "cuda" else []
    return ["clip + AdamW fused", "clip + AdamW foreach", "clip + AdamW plain", "AdamW fused, clip as grad_scale",
            *others, "ours"]  # fmt: skip


def build(case: Case, device: torch.device, wanted: Sequence[str]) -> list[Variant]:
    """The variants ``wanted``, each on its own parameters, all from the same start."""
    sizes = SETS[case.shape["set"]]
    generator = torch.Generator(device).manual_seed(0)
    start, grad = (torch.randn(sum(sizes), device=device, generator=generator) for _ in range(2))

    def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Step]:
        params: list[Tensor] = [nn.Parameter(p.clone()) for p in start.to(dtype).split(sizes)]
        for p, g in zip(params, grad.to(dtype).split(sizes), strict=True):
            p.grad = g.clone()
        return params, _step(name, params)

    def update(params: list[Tensor], step: Step) -> Tensor:
        for _ in range(3):
            for p, g in zip(params, grad.split(sizes), strict=True):
                p.grad.copy_(g)  # type: ignore[union-attr]  # clipping overwrote it
            step()
        return torch.cat([p.detach() for p in params]).double().sub_(start)

    oracle = update(*made("clip + AdamW foreach", torch.float64))
    plain = relative_error(update(*made("clip + AdamW plain")), oracle)
    variants = []
    for name in wanted:
        if name in OTHERS and importlib.util.find_spec(OTHERS[name][0].split(".")[0]) is None:
            variants.append(Variant(name, missing=f"{OTHERS[name][0].split('.')[0]} is not installed"))
            continue
        try:
            params, step = made(name)
            error = relative_error(update(params, step), oracle)
        except Exception as failure:
            variants.append(Variant.broken(name, failure))
            continue
        variants.append(Variant(name, step, error, error_budget(plain, torch.float32)))
    return variants


def _step(name: str, params: list[Tensor]) -> Step:
    if name == "ours":
        return ak.ClippedAdamW(params, lr=LR, max_norm=1.0).step
    if name == "AdamW fused, clip as grad_scale":
        return _with_grad_scale(params)
    if name in OTHERS:
        module, cls = OTHERS[name]
        optimizer = getattr(importlib.import_module(module), cls)(params, lr=LR, weight_decay=0.01)
    else:
        kind = name.rsplit(" ", 1)[-1]
        optimizer = torch.optim.AdamW(params, lr=LR, fused=kind == "fused", foreach=kind == "foreach")

    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def _with_grad_scale(params: list[Tensor]) -> Step:
    """Clipping as a gradient scale of the fused kernel: PyTorch's fastest way, but little known."""
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    optimizer.found_inf = torch.zeros((), device=params[0].device)  # type: ignore[attr-defined]

    def step() -> None:
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        optimizer.grad_scale = (norm + 1e-6).clamp(min=1)  # type: ignore[attr-defined]
        optimizer.step()

    return step
