"""What a model, its configurations and its optimizer refuse, in one line that says what to write."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkern as ak
from adapterkern.model.running import UnloadedError
from tests.support.tiny_llama import IDS, adapted, draw, tiny


def unloaded() -> ak.LlamaAdapter:
    model = adapted()
    model.unload()
    return model


def adam(**arguments: Any) -> Any:
    return ak.ClippedAdamW([torch.nn.Parameter(torch.zeros(2))], **arguments)


AFTER_UNLOAD = r"model: expected adapters that the backbone runs, but unload\(\) has taken them off"
# id, call (with an empty folder), exception, message
REFUSALS: list[tuple[str, Callable[[Path], Any], type[Exception], str]] = [
    # After unload()
    ("forward after unload", lambda _: unloaded()(IDS), RuntimeError, AFTER_UNLOAD),
    ("generate after unload", lambda _: unloaded().generate(IDS), RuntimeError, AFTER_UNLOAD),
    ("save after unload", lambda d: unloaded().save_pretrained(d), RuntimeError, AFTER_UNLOAD),
    ("save_adapterhub after unload", lambda d: unloaded().save_adapterhub(d), RuntimeError, AFTER_UNLOAD),
    ("push after unload", lambda _: unloaded().push_to_hub("a/b"), RuntimeError, AFTER_UNLOAD),
    ("parameters after unload", lambda _: unloaded().adapter_parameters(), RuntimeError, AFTER_UNLOAD),
    ("set after unload", lambda _: unloaded().set_adapter("default"), RuntimeError, AFTER_UNLOAD),
    ("disable after unload", lambda _: unloaded().disable_adapter(), RuntimeError, AFTER_UNLOAD),
    ("disable all after unload", lambda _: unloaded().disable_adapters(), RuntimeError, AFTER_UNLOAD),
    ("enable after unload", lambda _: unloaded().enable_adapters(), RuntimeError, AFTER_UNLOAD),
    ("add after unload", lambda _: unloaded().add_adapter("b", ak.AdapterConfig()), RuntimeError, AFTER_UNLOAD),
    ("liger after unload", lambda _: setattr(unloaded(), "liger", True), RuntimeError, AFTER_UNLOAD),
    ("mixing after unload", lambda _: unloaded().mixing([], IDS[:, 0]), RuntimeError, AFTER_UNLOAD),
    ("prefix after unload", lambda _: unloaded().run_prefix(IDS), RuntimeError, AFTER_UNLOAD),
    ("reference after unload", lambda _: unloaded().reference(), RuntimeError, AFTER_UNLOAD),
    ("count after unload", lambda _: unloaded().print_trainable_parameters(), RuntimeError, AFTER_UNLOAD),
    ("checkpointing after unload", lambda _: unloaded().gradient_checkpointing_enable(), RuntimeError, AFTER_UNLOAD),
    ("resize after unload", lambda _: unloaded().resize_token_embeddings(140), RuntimeError, AFTER_UNLOAD),
    ("its device after unload", lambda _: unloaded().device, RuntimeError, AFTER_UNLOAD),
    ("its head after unload", lambda _: unloaded().lm_head, RuntimeError, AFTER_UNLOAD),
    ("train after unload", lambda _: ak.train(unloaded(), []), RuntimeError, AFTER_UNLOAD),
    ("evaluate after unload", lambda _: ak.evaluate(unloaded(), [], ak.TrainConfig()), RuntimeError, AFTER_UNLOAD),
    (
        "evaluate without a head",
        lambda _: ak.evaluate(adapted(), [], ak.TrainConfig()),
        ValueError,
        r"head: expected a head for task 'classification', got None: give .* result.head, or load_run\(...\)\[1\]",
    ),
    (
        "an optimizer of a model",
        lambda _: ak.ClippedAdamW(adapted()),
        TypeError,
        r"params: expected tensors or groups, such as model.adapter_parameters\(\), got a LlamaForCausalLM",
    ),
    # Names of adapters
    (
        "several adapters",
        lambda _: adapted().adapter_config(["default"]),
        TypeError,
        r"name: expected the name of one adapter, got \['default'\]; several run at once .*adapter_names=.*set_adapter",
    ),
    ("deleting several", lambda _: adapted().delete_adapter(["default"]), TypeError, "name: expected the name of one"),
    (
        "a string of names",
        lambda _: adapted()(IDS, adapter_names="default"),
        TypeError,
        "adapter_names: expected a list of names, one per sequence of the batch, got 'default'",
    ),
    (
        "a string of names to generate",
        lambda _: adapted().generate(IDS, adapter_names="default"),
        TypeError,
        "adapter_names: expected a list of names",
    ),
    ("None among names", lambda _: adapted()(IDS, adapter_names=[None] * 3), TypeError, r"adapter_names: .*got \[None"),
    ("a string to mix", lambda _: adapted().mixing("default", IDS[:, 0]), TypeError, "names: expected a list of names"),
    # Kinds
    (
        "a dict as adapter config",
        lambda _: ak.LlamaAdapter(tiny(), {"adapter_dim": 4}),
        TypeError,
        r"config: expected an AdapterConfig, got \{'adapter_dim': 4\}: write AdapterConfig\(\*\*fields\)",
    ),
    (
        "config and name exchanged",
        lambda _: adapted().add_adapter(ak.AdapterConfig(), "b"),
        TypeError,
        "config: exp.*'b'",
    ),
    ("a path as backbone", lambda _: ak.LlamaAdapter("some/path"), TypeError, "llama: expected a transformers .* str"),
    (
        "from_pretrained of one path",
        lambda d: ak.LlamaAdapter.from_pretrained(str(d)),
        TypeError,
        "from_pretrained: expected the backbone, .* and the folder of an adapter, got '.*' and None; load the backbone",
    ),
    (
        "from_pretrained of two paths",
        lambda d: ak.LlamaAdapter.from_pretrained("base", d),
        TypeError,
        "from_pretrained: expected the backbone, .* got 'base' and ",
    ),
    ("fused", lambda _: setattr(adapted(), "fused", "no"), TypeError, "fused: expected True or False, got 'no'"),
    ("liger", lambda _: ak.LlamaAdapter(tiny(), liger="no"), TypeError, "liger: expected True or False, got 'no'"),
    (
        "too many arguments",
        lambda _: adapted()._named((None,) * 99, {}),
        TypeError,
        "forward: expected at most .* positional arguments, got 99",
    ),
    # transformers' methods that would do something else
    ("init_weights", lambda _: adapted().init_weights(), NotImplementedError, "init_weights: add_adapter initializes"),
    ("hotswap", lambda _: adapted().enable_peft_hotswap(), NotImplementedError, "enable_peft_hotswap: expected a PEFT"),
    (
        "push while saving",
        lambda d: adapted().save_pretrained(d, push_to_hub=True),
        ValueError,
        r"push_to_hub: expected none, got True; call push_to_hub\(repo_id\)",
    ),
    (
        "a variant",
        lambda d: adapted().save_pretrained(d, variant="fp16"),
        ValueError,
        "variant: expected none, got 'fp16'",
    ),
    # What ak.train and ak.evaluate are given
    (
        "a bare llama to train",
        lambda _: ak.train(tiny(), []),
        TypeError,
        r"model: expected a LlamaAdapter, got LlamaForCausalLM: wrap it, LlamaAdapter\(llama, AdapterConfig\(\)\)",
    ),
    (
        "a bare llama to evaluate",
        lambda _: ak.evaluate(tiny(), [], ak.TrainConfig()),
        TypeError,
        "model: expected a Ll",
    ),
    ("a path as model", lambda _: ak.train("llama", []), TypeError, "model: expected a LlamaAdapter, got str$"),
    (
        "a compiled model",
        lambda _: ak.train(torch.compile(adapted()), []),
        TypeError,
        r"model: expected a LlamaAdapter, got OptimizedModule: give the model itself; its compile\(\)",
    ),
    (
        "a dict as config",
        lambda _: ak.train(adapted(), [], {"lr": 1.0}),
        TypeError,
        r"config: expected a TrainConfig, got dict: write TrainConfig\(\*\*fields\)",
    ),
    ("an empty dict", lambda _: ak.train(adapted(), [], {}), TypeError, "config: expected a TrainConfig, got dict"),
    (
        "no config",
        lambda _: ak.evaluate(adapted(), [], None),
        TypeError,
        "config: expected a TrainConfig, got NoneType",
    ),
    (
        "a tokenizer's path",
        lambda _: ak.train(adapted(), [], tokenizer="some/path"),
        TypeError,
        r"tokenizer: expected a tokenizer .*, got str: load it, AutoTokenizer.from_pretrained\('some/path'\)",
    ),
    (
        "a tokenizer's path to evaluate",
        lambda d: ak.evaluate(adapted(), [], ak.TrainConfig(), tokenizer=d),
        TypeError,
        "tokenizer: expected a tokenizer of transformers, got PosixPath: load it",
    ),
    (
        "a head",
        lambda _: ak.train(adapted(), [], head=3),
        TypeError,
        "head: expected a Head or None, got int",
    ),
    (
        "a cache",
        lambda _: ak.train(adapted(), [], cache=True),
        TypeError,
        "cache: expected a PrefixCache or None, got bool",
    ),
]
# Names of other libraries: call, argument, what the message says to write
TRAIN = "model, train_data, config, tokenizer, eval_data, drift_data, head, cache, task, sources, callbacks, dry_run"
OTHER_NAMES: list[tuple[Callable[..., Any], str, str]] = [
    (ak.AdapterConfig, "r", "adapter_dim"),
    (ak.AdapterConfig, "target_modules", "position and layers"),
    (ak.AdapterConfig, "lora_alpha", "scale, which is lora_alpha / r,"),
    (ak.AdapterConfig, "reduction_factor", "adapter_dim, which is hidden_size / reduction_factor,"),
    (ak.AdapterConfig, "non_linearity", "activation"),
    (ak.TrainConfig, "learning_rate", "lr"),
    (ak.TrainConfig, "num_train_epochs", "epochs"),
    (ak.TrainConfig, "per_device_train_batch_size", "batch_size"),
    (ak.TrainConfig, "gradient_accumulation_steps", "accumulation"),
    (ak.TrainConfig, "max_grad_norm", "max_norm"),
    (ak.TrainConfig, "bf16", 'precision="bf16"'),
    (adam, "max_grad_norm", "max_norm"),
    (adam, "learning_rate", "lr"),
    (adam, "amsgrad", "no such argument: AMSGrad is not implemented"),
    (lambda **a: adapted().add_adapter("b", **a), "adapter_config", "config"),
    (lambda **a: adapted().add_adapter(config=ak.AdapterConfig(), **a), "adapter_name", "name"),
    (lambda **a: adapted().load_adapter("folder", **a), "adapter_name", "name"),
    (lambda **a: adapted().save_pretrained(**a), "save_directory", "directory"),
    (lambda **a: ak.LlamaAdapter.from_pretrained(tiny(), **a), "model_id", "directory"),
    (lambda **a: adapted().set_adapter(**a), "adapter_name", "name"),
    (lambda **a: ak.LlamaAdapter(tiny(), **a), "peft_config", "config"),
    (lambda **a: ak.train(adapted(), [], **a), "eval_dataset", "eval_data"),
    (lambda **a: ak.train(adapted(), [], **a), "epochs", "config=TrainConfig(epochs=...)"),
    (lambda **a: ak.train(adapted(), [], **a), "learning_rate", "config=TrainConfig(lr=...)"),
    (lambda **a: ak.train(adapted(), [], **a), "bf16", 'config=TrainConfig(precision="bf16")'),
    (lambda **a: ak.evaluate(adapted(), [], **a), "processing_class", "tokenizer"),
    # Nobody's
    (ak.AdapterConfig, "adapter_dims", "adapter_dim"),
    (ak.TrainConfig, "epoch", "epochs"),
    (ak.TrainConfig, "ep", "epochs or eps"),
    (ak.TrainConfig, "disable_tqdm", "progress=False"),
    (adam, "weightdecay", "weight_decay"),
    (
        lambda **a: ak.train(adapted(), [], **a),
        "zzz",
        f"one of {TRAIN}",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_is_refused_in_one_line(tmp_path: Path, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(tmp_path)
    assert type(caught.value) is error or (error, type(caught.value)) == (RuntimeError, UnloadedError)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("call", "name", "instead"), OTHER_NAMES)
def test_a_name_that_another_library_has(call: Any, name: str, instead: str) -> None:
    with pytest.raises(TypeError) as caught:
        call(**{name: "given"})
    assert str(caught.value).startswith(f"{name}: expected {instead} in ")
    assert str(caught.value).endswith(f"got {name}='given'")


def test_what_is_left_after_unload() -> None:
    model = unloaded()
    assert not hasattr(model, "lm_head")
    assert not hasattr(model, "base")
    assert model.active_adapters() == []
    assert next(model.to(torch.float64).parameters()).dtype == torch.float64
    file = io.BytesIO()
    torch.save(model.eval(), file)
    file.seek(0)
    state = torch.load(file, weights_only=False).state_dict()
    assert all(key.startswith("adapters.default.") for key in state)
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"


def test_our_own_names_still_work() -> None:
    assert ak.AdapterConfig(8, "attention", every=2).adapter_dim == 8
    assert ak.TrainConfig(lr=1.0).lr == 1.0
    assert adam(lr=0.5, max_norm=None).param_groups[0]["lr"] == 0.5
    model = adapted()
    model.add_adapter(name="b", config=ak.AdapterConfig(adapter_dim=4))
    draw(model, "b")
    model.set_adapter(name="b")
    assert model.active_adapters() == ["b"]
