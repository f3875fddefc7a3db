"""The operator's calls that are not plain: a residual, a scale, no LayerNorm; through torch's own checks, and mixed."""

from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.ops.dropout import Drop
from adapterkern.ops.reference import Weights, adapter_eager
from tests.support.numerics import make_weights
from tests.support.variants import SEED, VARIANTS, check, evaluate, make_case


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_and_compile(variant: str) -> None:
    for dtype in (torch.float64, torch.float32):
        case = make_case(variant, 6, 12, 4, dtype)
        case = case.to(torch.float64) if dtype == torch.float64 else case
        for save, leaves in ((True, case.leaves()), (False, case)):
            learned, factor = (leaves.scale, 1.0) if isinstance(leaves.scale, Tensor) else (None, leaves.scale)
            of_rows = None if leaves.gate is None else leaves.gate.to(torch.promote_types(dtype, torch.float32))
            drop = leaves.dropout, torch.tensor([SEED]) if leaves.dropout else None
            more = False, None, None, leaves.residual, learned, factor, of_rows, *drop
            arguments = (leaves.x, *leaves.weights, 1e-5, "silu", None, save, *more)
            torch.library.opcheck(torch.ops.adapterkern.adapter_forward.default, arguments)
        torch._dynamo.reset()
        compiled = torch.compile(ak.adapter, fullgraph=True, backend="aot_eager")
        got, expected = (evaluate(call, case) for call in (compiled, ak.adapter))
        assert got.keys() == expected.keys()
        for name, e in expected.items():
            torch.testing.assert_close(got[name], e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixed_batch_is_each_adapter_alone(variant: str) -> None:
    case = make_case(variant, 12, 24, 8, torch.float32, n=3).view(4, 3, 24)
    index = torch.tensor([2, -1, 0, 2])

    def op(
        x: Tensor, *weights: Tensor, residual: Tensor | None, scale: Any, gate: Any, dropout: float, seed: int | None
    ) -> Tensor:
        learned, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
        drop = dropout, None if seed is None else torch.tensor([seed])
        of_rows = None if gate is None else gate.view(-1)
        how = 1e-5, "silu", None, True, False, index, None, residual, learned, factor, of_rows, *drop
        return torch.ops.adapterkern.adapter_forward(x, *weights, *how)[0]

    ours, theirs = evaluate(op, case), evaluate(ak.adapter, case, fused=False, index=index)
    exact = evaluate(ak.adapter, case.to(torch.float64), fused=False, index=index)
    check(case, ours, theirs, exact, torch.finfo(torch.float32).eps, index=index)
    base = case.x if case.residual is None else case.residual
    mask = Drop(case.dropout, torch.tensor(SEED)).mask(12, 8, torch.float32).view(4, 3, 8)
    for i, e in enumerate(index.tolist()):
        one = [None if w is None else w[e] for w in case.weights]
        scale = case.scale[e] if isinstance(case.scale, Tensor) else case.scale
        own = {"gate": None if case.gate is None else case.gate[i], "mask": mask[i] if case.dropout else None}
        alone = adapter_eager(case.x[i], Weights(*one), residual=base[i], scale=scale, **own) if e >= 0 else base[i]
        torch.testing.assert_close(ours["y"][i], alone)


def test_a_residual_alone_may_require_a_gradient() -> None:
    x, w = torch.randn(6, 12), make_weights(12, 4)
    residual = torch.randn(6, 12, requires_grad=True)
    dy = torch.randn(6, 12)
    y = torch.ops.adapterkern.adapter_forward(x, *w, 1e-5, "silu", None, True, False, None, None, residual)[0]
    (got,) = torch.autograd.grad(y, residual, dy)
    assert torch.equal(got, dy)
    with torch.no_grad():
        assert torch.equal(ak.adapter(x, *w, residual=x), ak.adapter(x, *w))
