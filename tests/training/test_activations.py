"""What a step keeps for its backward: the formula of ``budget --memory`` against what autograd saves; checkpointed and
offloaded steps against plain ones, to the bit.
"""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkern as ak
from adapterkern.model.memory import Choice, Shape, Training
from adapterkern.model.scale import Scale
from adapterkern.training import activations
from adapterkern.training.activations import Offload, check_offload, checkpointed, offloaded
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.task import Task
from tests.support import tiny_run
from tests.support.tiny_llama import draw, tiny

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "vocab_size": 300}
SHAPE = Shape(64, 5, 160, 4, 2, 16, 300)
ROWS, LENGTH = 4, 48


def made(task: str, dtype: torch.dtype, attn: str, **adapter: Any) -> tuple[Task[Any], dict[str, Tensor]]:
    llama = tiny(**SIZES, attn_implementation=attn).to(dtype)
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(**{"adapter_dim": 8} | adapter))
    draw(model)
    torch.manual_seed(1)
    head = ClassificationHead(64, ["a", "b"]) if task == "classification" else None
    ids, mask = torch.randint(3, 300, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, -3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if head is not None:
        batch["targets"] = torch.tensor([0, 1, 1, 0])
    else:
        batch |= {"targets": ids.flatten(), "positions": torch.arange(ids.numel())}
    return Task(model, head).train(), batch


def kept(task: Task[Any], batch: dict[str, Tensor]) -> int:
    """Bytes of what autograd keeps of a forward: storages, each once, that are no parameter's."""
    frozen = {t.untyped_storage().data_ptr() for t in (*task.parameters(), *task.buffers(), *batch.values())}
    found: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            found.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = task(batch)
    total = sum(size for storage, size in found.values() if not storage.expired())
    loss.backward()
    return total


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("task", "adapter"),
    [
        ("classification", {"every": 2}),
        ("causal-lm", {"layers": [0, 3], "position": "attention"}),
        ("causal-lm", {"layers": [1, 3], "kind": "prompt", "adapter_dim": 64}),
        ("causal-lm", {"layers": [1, 3], "kind": "prompt", "adapter_dim": 64, "bias_scale": True}),
        ("causal-lm", {"layers": [1, 3], "bias_scale": True}),
    ],
)
def test_what_autograd_keeps(
    dtype: torch.dtype,
    name: str,
    attn: str,
    recompute: bool,
    task: str,
    adapter: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapterkern.ops.operator.prefers_eager", lambda *_: False)  # as at sizes where memory matters
    run, batch = made(task, dtype, attn, **adapter)
    learned = LENGTH if task == "causal-lm" else 0
    config = run.model.adapter_config()
    expected = Training(SHAPE, config, LENGTH, learned, name, attn).memory(ROWS, Choice(checkpointed=recompute)).kept
    with checkpointed(run.model) if recompute else contextlib.nullcontext():
        assert kept(run, batch) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_full_fine_tuning_keeps(dtype: torch.dtype, name: str, recompute: bool) -> None:
    run, batch = made("causal-lm", dtype, "sdpa", layers=[4])
    run.model.base.requires_grad_(True)
    training = Training(SHAPE, run.model.adapter_config(), LENGTH, LENGTH, name)
    expected = Scale(training, ROWS, full=True, checkpointed=recompute).memory("DDP", 1).kept
    with run.model.disable_adapter(), checkpointed(run.model) if recompute else contextlib.nullcontext():
        assert kept(run, batch) == pytest.approx(expected, rel=0.05)


def test_an_h100_kept_and_allocated_that_much() -> None:
    """LLaMA-7B, every second layer adapted, 4×1024 tokens without padding: bench/RESULTS.md, in MiB."""
    shape = Shape(4096, 32, 11008, 32, 32, 128, 32000)
    adapter = ak.AdapterConfig(every=2).resolve(4096, 32)
    taken = Training(shape, adapter, 1024, 1024, "bf16", padded=False).memory(4)
    assert taken.kept / 2**20 == pytest.approx(16520.5, rel=1e-3)
    assert (taken.kept + taken.workspace) / 2**20 == pytest.approx(17521.0, rel=1e-3)


def test_weights_are_those_of_transformers_and_bitsandbytes() -> None:
    with torch.device("meta"):
        for shape in (SHAPE, SHAPE._replace(tied=True), Shape(96, 3, 200, 6, 3, 32, 500)):
            fields = {"num_key_value_heads": shape.num_kv_heads, "tie_word_embeddings": shape.tied}
            names = ["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"]
            fields |= dict(zip(names, shape[:4], strict=True))
            llama = LlamaForCausalLM(LlamaConfig(**fields, head_dim=shape.head_dim, vocab_size=shape.vocab_size))
            llama.tie_weights()
            assert shape.num_params == sum(p.numel() for p in llama.parameters())
    functional = pytest.importorskip("bitsandbytes.functional")
    bits = 0
    for out, into in (shape := Shape(128, 1, 512, 4, 4, 32, 10)).matrices:
        packed, state = functional.quantize_nf4(torch.randn(out, into), compress_statistics=True, blocksize=64)
        bits += packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    others = 2 * (shape.num_params - sum(o * i for o, i in shape.matrices))
    assert shape.weights(2, "4bit") == pytest.approx(bits + others, rel=1e-3)


def gradients(task: Task[Any], batch: dict[str, Tensor]) -> list[Tensor]:
    task.zero_grad()
    loss, _ = task(batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in task.parameters() if p.grad is not None)]


@pytest.mark.parametrize("adapter", [{"every": 2}, {"layers": [1, 3], "position": "attention", "depth": 2}])
@pytest.mark.parametrize("recompute", [False, True])
def test_offloaded_steps_keep_their_bits_and_move_activations_alone(
    adapter: dict[str, Any], recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the CPU to the CPU: the device is another, the hooks are the same."""
    monkeypatch.setattr(activations, "SMALLEST", 2000)  # here matrices are as small as row factors elsewhere
    task, batch = made("causal-lm", torch.float32, "sdpa", **adapter)
    moved: list[Tensor] = []
    pack = Offload.pack

    def recorded(self: Offload, tensor: Tensor) -> Any:
        found = pack(self, tensor)
        if not isinstance(found, Tensor):
            moved.append(found.host)
        return found

    frozen = {p.shape for p in task.parameters()} | {p.shape[::-1] for p in task.parameters()}
    monkeypatch.setattr("adapterkern.ops.operator.prefers_eager", lambda *_: False)
    expected = gradients(task, batch)
    monkeypatch.setattr(Offload, "pack", recorded)
    with checkpointed(task.model) if recompute else contextlib.nullcontext(), offloaded(task, task.model):
        got = gradients(task, batch)
        again = gradients(task, batch)
    assert all(map(torch.equal, got, expected))
    assert all(map(torch.equal, again, expected))
    assert moved
    assert not frozen & {tensor.shape for tensor in moved}
    assert all(tensor.shape[-1] != SIZES["vocab_size"] for tensor in moved)  # logits stay
    per_step = sum({id(tensor): tensor.nbytes for tensor in moved}.values()) / 2
    config = task.model.adapter_config()
    choice = Choice(checkpointed=recompute, offloaded=True)
    host = Training(SHAPE, config, LENGTH, LENGTH, "fp32").memory(ROWS, choice).host
    host -= ROWS * LENGTH * 64 * 4  # of the first layer's input, or its adapter's, no gradient flows on
    assert per_step == pytest.approx(host, rel=0.08)  # the factors of rows, small on any real model, stay
    del moved[:]
    gradients(task, batch)
    assert not moved  # its hooks are gone


def test_what_is_offloaded_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SMALLEST", 2000)
    task, batch = made("classification", torch.float32, "sdpa", every=2)
    plain = kept(task, batch)
    states: list[StorageWeakRef] = []
    task.model.layers[3].mlp.act_fn.register_forward_hook(
        lambda module, inputs, output: states.append(StorageWeakRef(output.untyped_storage()))
    )
    saved: list[StorageWeakRef] = []
    pack = Offload.pack

    def recorded(self: Offload, tensor: Tensor) -> Any:
        if tensor.requires_grad and not tensor.is_leaf and not tensor._is_view():
            saved.append(StorageWeakRef(tensor.untyped_storage()))
        return pack(self, tensor)

    monkeypatch.setattr(Offload, "pack", recorded)
    with offloaded(task, task.model):
        loss, _ = task(batch)
    assert plain > 0
    assert states[0].expired()
    del loss  # without a backward, as after an error
    assert saved
    assert all(storage.expired() for storage in saved)  # no node holds itself


@pytest.mark.parametrize("changes", [{}, {"prefix_cache": False}, {"precision": "bf16", "task": "causal-lm"}])
def test_a_training_keeps_its_bits(changes: dict[str, Any]) -> None:
    """With the prefix cache, whose suffix is checkpointed, too."""

    def run(**more: Any) -> list[Tensor]:
        model = tiny_run.model(layers=(1, 2))
        config = tiny_run.quiet(max_steps=6, **changes | more)
        rows = [{"text": row["text"]} for row in tiny_run.rows(12)] if "task" in changes else tiny_run.rows(12)
        result = ak.train(model, rows, config, tokenizer=tiny_run.tokenizer())
        assert not model.checkpoints_activations
        return tiny_run.weights(model, result.head)

    expected = run()
    assert tiny_run.same_bits(run(checkpoint_activations=True), expected)


@pytest.mark.parametrize("name", ["checkpoint_activations", "offload_activations"])
def test_what_is_refused_or_has_no_effect(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"^offload_activations: expected a backbone on a GPU, got one on the CPU"):
        check_offload(torch.device("cpu"))
    monkeypatch.setattr("adapterkern.training.api.check_offload", lambda device: None)
    how = {name: True}
    ak.train(
        tiny_run.model(), tiny_run.rows(8), tiny_run.quiet(max_steps=1, train_adapters=False, **how),
        tokenizer=tiny_run.tokenizer(),
    )  # fmt: skip
    assert f"config: {name}=True has no effect without adapters to train" in caplog.messages
    ak.train(
        tiny_run.model(layers=(3,)), tiny_run.rows(8), tiny_run.quiet(max_steps=1, prefix_cache=True, **how),
        tokenizer=tiny_run.tokenizer(),
    )  # fmt: skip
    assert f"{name}: has no effect: all layers' outputs come from the prefix cache" in caplog.messages
    model = tiny_run.model()
    monkeypatch.setattr(type(model.base), "supports_gradient_checkpointing", False)
    if name == "checkpoint_activations":
        with pytest.raises(ValueError, match=r"^checkpoint_activations: expected .*, got LlamaForCausalLM$"):
            ak.train(model, tiny_run.rows(8), tiny_run.quiet(**how), tokenizer=tiny_run.tokenizer())
