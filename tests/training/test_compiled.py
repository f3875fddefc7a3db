"""Frozen layers compiled: the same numbers and gradients, one graph for all layers, and nothing stays."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapterkern.training import compiled, train
from adapterkern.training.compiled import check_compile, compiled_layers
from adapterkern.training.parallel.frozen import cast_once
from adapterkern.training.run.interrupt import StopRequest, is_stopping
from tests.support import tiny_run

COMPILED = compiled._compiled
SHAPES = ((3, 6), (5, 9), (2, 4))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is compiled is traced as always, and then run by PyTorch: the same graphs in a tenth of the time."""
    run_by("eager", monkeypatch)
    yield
    forget()


@pytest.fixture
def inductor() -> Iterator[None]:
    forget()
    yield
    forget()


def run_by(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make: Callable[..., Any] = torch.compile

    def trace(function: Any, **how: Any) -> Any:
        return make(function, **{name: value for name, value in how.items() if name != "options"}, backend=backend)

    monkeypatch.setattr(torch, "compile", trace)
    forget()


def forget() -> None:
    torch.compiler.reset()
    counters.clear()
    COMPILED.cache_clear()
    compiled._check_compiler.cache_clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def learn(model: Any, shape: tuple[int, int] = SHAPES[0], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The loss of a padded batch, and the gradients of the adapters."""
    ids = torch.arange(1, shape[0] * shape[1] + 1).view(shape)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    model.zero_grad()
    with contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.adapter_parameters())]


def same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert all(b.abs().max() > 0 for b in expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


def drawn(**adapter: Any) -> Any:
    """Adapters that all get a gradient: the identity init is drawn over."""
    model = tiny_run.model(**adapter).train()
    for p in model.adapter_parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


# Two graphs: the layers below the first adapter have an input without gradient. With halves of layers, of which the MLP
# always has a gradient: five.
@pytest.mark.parametrize(("position", "most"), [("layer", 2), ("attention", 5)])
def test_numbers_and_gradients_stay_with_a_graph_for_all_layers(position: str, most: int, traced: None) -> None:
    model = drawn(position=position, layers=(1, 3))
    expected = [learn(model, shape) for shape in SHAPES]
    with compiled_layers(model):
        for shape, wanted in zip(SHAPES, expected, strict=True):
            same(learn(model, shape), wanted)
    assert 0 < graphs() <= most
    with compiled_layers(model):  # a second training
        learn(model)
    other = drawn(position=position, layers=(0, 3), seed=1)
    with compiled_layers(other):  # another model
        learn(other)
    assert graphs() <= most


def test_with_weights_that_are_cast_once_and_recomputed_layers(traced: None) -> None:
    model = drawn()
    expected = learn(model, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable()
    with cast_once(model), compiled_layers(model):
        for _ in range(3):
            same(learn(model, dtype=torch.bfloat16), expected)
    assert graphs() == 2


def test_without_gradients_nothing_is_compiled(traced: None) -> None:
    model = drawn()
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        with compiled_layers(model):
            assert torch.equal(model(ids).logits, expected)
    with compiled_layers(model):
        model(ids, use_cache=True)  # nor with a cache, which grows
    assert graphs() == 0


def test_an_odd_batch_of_one_row_is_not_compiled(traced: None) -> None:
    model = drawn()
    expected = learn(model, (1, 6))
    with compiled_layers(model):
        learn(model)
        same(learn(model, (1, 6)), expected)
    assert graphs() == 2
    with compiled_layers(model):  # which is the usual batch here
        same(learn(model, (1, 6)), expected)
    assert graphs() == 4


@pytest.mark.slow  # the kernel is chosen when a graph's operations are traced too
def test_attention_takes_the_kernel_that_the_step_chose(inductor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run_by("aot_eager", monkeypatch)
    model = drawn()
    expected, ran = learn(model), []
    with compiled_layers(model):
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH) * 2:
            with sdpa_kernel(kernel), torch.profiler.profile() as profile:
                same(learn(model), expected)
            ran.append(any("flash" in event.name for event in profile.events()))
    assert ran == [True, False] * 2
    assert graphs() == 4


def test_all_is_restored(traced: None) -> None:
    model = drawn()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    with contextlib.suppress(KeyError), cast_once(model), compiled_layers(model):
        learn(model, dtype=torch.bfloat16)
        assert list(model.state_dict()) == keys
        raise KeyError
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before


def test_more_variants_than_are_kept_run_uncompiled(
    traced: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_VARIANTS", 1)
    model = drawn()
    expected = learn(model)
    with compiled_layers(model):
        for _ in range(2):
            same(learn(model), expected)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("adapterkern")]
    assert ours == ["compile: more than 1 variants of layers and batches; more run uncompiled"]


def test_layers_that_cannot_be_compiled_are_refused(traced: None) -> None:
    model = drawn()
    model.base.model.layers[3].mlp.act_fn.forward = lambda x: (torch._dynamo.graph_break(), x)[1]
    with compiled_layers(model), pytest.raises(ValueError, match=r"^compile: expected .* got LlamaDecoderLayer: Unsup"):
        learn(model)


# aot_eager keeps other tensors for the backward than what runs uncompiled: a layer is recomputed as it ran.
@pytest.mark.parametrize(
    ("recomputed", "backend"), [(False, "eager"), pytest.param(True, "aot_eager", marks=pytest.mark.slow)]
)
def test_a_compiler_that_ctrl_c_ends_is_not_the_layers_fault(
    recomputed: bool, backend: str, inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal sends Ctrl-C to the compiler, too. The step must end with its numbers, and then the run."""
    run_by(backend, monkeypatch)
    model = drawn()
    expected = learn(model)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole, seen = compiled._compiled(), []

    def cut_short(part: Any, written_out: bool, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer is model.layers[3] and layer not in seen:
            seen.append(layer)
            signal.raise_signal(signal.SIGINT)
            raise TorchDynamoException("CppCompileError")
        return whole(part, written_out, layer, *args, **kwargs)

    monkeypatch.setattr(compiled, "_compiled", lambda: cut_short)
    with StopRequest() as stop, compiled_layers(model):
        same(learn(model), expected)
    assert seen
    assert stop.signal_name == "SIGINT"
    assert not is_stopping()


def losses(result: Any) -> list[float]:
    return [entry[key] for entry in result.history for key in ("loss", "eval_loss") if key in entry]


def run(rows: int = 24, **settings: Any) -> Any:
    model = tiny_run.model(init="xavier")
    data, unseen = tiny_run.rows(rows), tiny_run.rows(8, seed=1)
    config = tiny_run.quiet(log_every=1, epochs=1, **settings)
    return train(model, data, config, tokenizer=tiny_run.tokenizer(), eval_data=unseen)


@pytest.mark.parametrize("cached", [False, True])
def test_a_training_learns_the_same(cached: bool, traced: None) -> None:
    expected = run(prefix_cache=cached)
    assert graphs() == 0
    got = run(prefix_cache=cached, compile=True)
    assert graphs() == (2 if cached else 3)  # one is the check of the machine
    assert len(losses(got)) == len(losses(expected)) > 6
    assert losses(got) == pytest.approx(losses(expected), rel=1e-4)
    assert got.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)


def test_packed_batches_of_one_row_are_compiled_too(traced: None) -> None:
    """Of 2 texts in a row or two: a graph for each."""
    packed = {"task": "causal-lm", "packing": True, "batch_size": 2, "max_length": 24, "prefix_cache": False}
    expected = run(**packed)
    assert graphs() == 0
    got = run(**packed, compile=True)
    assert graphs() == 5  # as above, twice
    assert losses(got) == pytest.approx(losses(expected), rel=1e-4)


def test_a_resumed_run_may_change_it(tmp_path: Path, traced: None) -> None:
    expected = run(max_steps=6)
    run(max_steps=6, output_dir=tmp_path, compile=True, checkpoint_every=3)
    (tmp_path / "checkpoints" / "step-00000006").rename(tmp_path / "later")
    got = run(max_steps=6, output_dir=tmp_path, resume=True)
    assert losses(got) == pytest.approx(losses(expected), rel=1e-4)


def test_a_machine_without_a_compiler_is_told(inductor: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})  # monkeypatch would leave it unset
    with without, pytest.raises(ValueError, match=r"^compile: expected a machine on which .*, got Inductor.*C\+\+"):
        check_compile(tiny_run.model())


def test_an_error_of_the_compiler_says_what_was_wrong() -> None:
    inner = RuntimeError("no C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")
    error = BackendCompilerFailed(lambda graph, inputs: graph, inner, None)
    assert compiled._line(error) == "RuntimeError: no C++ compiler found"
    assert compiled._line(inner) == "RuntimeError: no C++ compiler found"


def test_nothing_left_to_compile_is_named(traced: None, caplog: pytest.LogCaptureFixture) -> None:
    for layers, expected in (((3,), 1), ((0, 3), 0)):
        caplog.clear()
        config = tiny_run.quiet(compile=True, prefix_cache=None, max_steps=3)
        train(tiny_run.model(layers=layers), tiny_run.rows(8), config, tokenizer=tiny_run.tokenizer())
        assert sum("compile: has no effect" in m for m in caplog.messages) == expected


@pytest.mark.slow  # it compiles for half a minute
def test_with_the_compiler(inductor: None) -> None:
    model = drawn()
    model.config.attention_dropout = 0.5
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.5
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.1)):
        torch.manual_seed(1)
        expected = learn(model, dtype=dtype)
        with cast_once(model), compiled_layers(model):
            for _ in range(2):
                torch.manual_seed(1)
                same(learn(model, dtype=dtype), expected, tolerance)
    assert graphs() == 4
    assert counters["inductor"]
