"""Adapters initialized from given weights: ``python -m experiments.low_rank accuracy|given``.

``accuracy``: the distance of W_up·W_down from the truncated SVD in fp64 of the weight, with the SVD that the package
uses (fp64, rounded) and with an fp32 SVD.

``given``: what such an initialization gains. SmolLM2-135M's first 8 of 30 layers, with an adapter of
``activation="identity"`` after the 8th. Over newswire texts (Reuters R8), ridge regression fits the map from the
normalized stream there to what the other 22 layers add to it,

    M, b = argmin Σ ‖Δ − b − M·LayerNorm(h)‖² + λ‖M‖²          Δ what the 22 layers add

and M initializes the adapter: W_up·W_down is M's best approximation of rank r, b_up the best b for it. A second way
takes, for each r, the matrix of rank r that predicts Δ best (reduced-rank regression: P·M with P the projection on the
r directions in which M·LayerNorm(h) varies most). The LM head's perplexity on other texts is compared with that of the
bare 8 layers and of all 30. No training step is made.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import adapterkern as ak
from adapterkern.model.decoder import keep_layers
from adapterkern.model.low_rank import init_from_weights
from adapterkern.recipes.demo import corpora
from adapterkern.training import TrainConfig, evaluate, load_examples
from adapterkern.training.data.batches import collate
from experiments.common import backbone, cpu_timed, make_parser, parse, record

NUM_LAYERS = 8
RANK, RANKS = 64, (8, 64, 256, 512)
CONFIG = TrainConfig(task="causal-lm", max_length=64, batch_size=16)


def main() -> None:
    """Run one of the two studies and write its file."""
    parser = make_parser("low_rank", __doc__)
    parser.add_argument("action", choices=("accuracy", "given"))
    parser.add_argument("--texts", type=int, default=160, metavar="N", help="given: texts to fit on; default 160")
    arguments = parse(parser)
    torch.set_num_threads(1)
    if arguments.action == "accuracy":
        record(arguments.output / "accuracy.json", rows=accuracy())
        return
    result, seconds = cpu_timed(lambda: given(arguments.texts))
    record(arguments.output / "given-weights.json", cpu_seconds=seconds, **result)


def accuracy() -> list[dict[str, Any]]:
    """Relative errors of W_up·W_down by size, kind of matrix and SVD, and the SVD's CPU seconds."""
    torch.manual_seed(0)
    llama, _ = backbone(num_layers=1)
    weights = {"o_proj of SmolLM2-135M's layer 0": llama.model.layers[0].self_attn.o_proj.weight.detach()}
    for d in (576, 1024):
        weights[f"Gaussian, d={d}"] = gaussian = torch.randn(d, d) / d**0.5
        U, _, Vt = torch.linalg.svd(gaussian)
        weights[f"singular values 1/i, d={d}"] = U / torch.arange(1, d + 1) @ Vt
    rows = []
    for name, weight in weights.items():
        U, S, Vt = torch.linalg.svd(weight.double())
        best = (U[:, :RANK] * S[:RANK]) @ Vt[:RANK]
        shipped = ak.Adapter(len(weight), RANK)
        _, seconds = cpu_timed(functools.partial(shipped.reset_parameters, "svd", weight))
        (U, S, Vt), seconds_fp32 = cpu_timed(functools.partial(torch.linalg.svd, weight, full_matrices=False))
        root = S[:RANK].sqrt()
        low = (U[:, :RANK] * root).double() @ (root[:, None] * Vt[:RANK]).double()
        product = shipped.up.weight.detach().double() @ shipped.down.weight.detach().double()
        error, error_fp32 = (((t - best).norm() / best.norm()).item() for t in (product, low))
        rows.append({"weight": name, "r": RANK, "error": error, "error_fp32_svd": error_fp32})
        rows[-1] |= {"seconds": seconds, "seconds_fp32_svd": seconds_fp32}
        print(rows[-1], flush=True)
    return rows


def given(texts: int) -> dict[str, Any]:
    """Perplexity and unexplained share per map and rank."""
    llama, tokenizer = backbone()
    fit_on = corpora.draw_texts(corpora.R8_TRAIN, texts, seed=0)
    unseen = corpora.draw_texts(corpora.R8_TEST, 60, seed=0)

    rows: list[dict[str, Any]] = []

    def measure(name: str, rank: int = 1, weight: Tensor | None = None, fit: Fit | None = None) -> None:
        model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=rank, layers=(-1,), activation="identity"))
        unexplained = None
        if weight is not None:
            init_from_weights(model, {-1: weight})
        if fit is not None:
            (adapter,) = model.adapters["default"][str(len(model.layers) - 1)]  # type: ignore[index]
            with torch.no_grad():
                adapter.up.bias.copy_(fit.mean - adapter.up.weight @ (adapter.down.weight @ fit.center))
                left = fit.below + fit.added - adapter(fit.below)
            unexplained = (left.square().sum() / (fit.added - fit.mean).square().sum()).item()
        value = evaluate(model, unseen, CONFIG, tokenizer=tokenizer)["perplexity"]
        model.unload()
        rows.append({"layers": name, "rank": rank, "perplexity": value, "unexplained": unexplained})
        print(rows[-1], flush=True)

    measure("30")
    fit = ridge(*streams(llama, fit_on, tokenizer))
    keep_layers(llama.model, 0, NUM_LAYERS)
    measure("8")
    measure("8 + b", fit=fit)
    for rank in RANKS:
        project = fit.directions[:, :rank] @ fit.directions[:, :rank].T
        measure("8 + SVD of M", rank, fit.matrix, fit)
        measure("8 + SVD of P·M", rank, project @ fit.matrix, fit)
    return {
        "backbone": "SmolLM2-135M-Instruct, fp32",
        "tokens": {"fitted": len(fit.below), "texts": texts, "tested": 60},
        "rows": rows,
    }


def streams(llama: Any, file: Path, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The stream (N, d) after the first layers, and what the others add to it, for all tokens but the first of a text.

    The first token's state is the same in every text and some hundred times as large as the others: it alone would
    decide the fit.
    """
    examples, _ = load_examples(file, CONFIG, tokenizer)
    kept: dict[int, Tensor] = {}
    hooks = [
        llama.model.layers[i].register_forward_hook(lambda *arguments, i=i: kept.update({i: arguments[2]}))
        for i in (NUM_LAYERS - 1, len(llama.model.layers) - 1)
    ]
    below, above = [], []
    with torch.no_grad():
        for start in range(0, len(examples), CONFIG.batch_size):
            batch = collate(examples[start : start + CONFIG.batch_size], CONFIG)
            llama.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            real = batch["attention_mask"].bool()
            real[:, 0] = False
            low, high = (t[0] if isinstance(t, tuple) else t for t in kept.values())
            below.append(low[real])
            above.append(high[real])
    for hook in hooks:
        hook.remove()
    stream = torch.cat(below)
    return stream, torch.cat(above) - stream


class Fit(NamedTuple):
    """A ridge regression: its data and its result."""

    below: Tensor  # (N, d)
    added: Tensor  # (N, d) Δ
    mean: Tensor  # (d,) mean of Δ
    center: Tensor  # (d,) mean of the normalized stream
    matrix: Tensor  # (d, d) M, fp64
    directions: Tensor  # (d, d) fp64, orthonormal columns: where M's predictions vary most, in falling order


def ridge(below: Tensor, added: Tensor) -> Fit:
    """Fit M with λ = 1/100 of the features' mean variance; b = mean − M·center."""
    features = F.layer_norm(below.double(), below.shape[1:])
    center, mean = features.mean(0), added.double().mean(0)
    features -= center
    gram = features.T @ features
    penalty = 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    matrix = torch.linalg.solve(gram + penalty, features.T @ (added.double() - mean)).T
    directions = torch.linalg.svd(features @ matrix.T, full_matrices=False).Vh.T
    return Fit(below, added, mean.float(), center.float(), matrix, directions)


if __name__ == "__main__":
    main()
