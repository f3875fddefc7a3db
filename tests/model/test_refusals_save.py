"""What saving, loading and ``modules_to_save`` refuse, one row each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

import adapterkern as ak
from adapterkern.model.files.folder import CONFIG_NAME
from tests.support.tiny_llama import tiny


def of(*names: str, llama: Any = None, **config: Any) -> ak.LlamaAdapter:
    return ak.LlamaAdapter(llama or tiny(), ak.AdapterConfig(4, layers=[2], modules_to_save=list(names), **config))


def classifier(labels: int = 2) -> Any:
    return LlamaForSequenceClassification(tiny(num_labels=labels).config)


def resized(tokens: int) -> Any:
    llama = tiny()
    llama.resize_token_embeddings(tokens, mean_resizing=False)
    return llama


def with_head(head: Any) -> Any:
    llama = tiny()
    llama.lm_head = head
    return llama


def saved(folder: Path, model: ak.LlamaAdapter) -> Path:
    model.save_pretrained(folder)
    return folder


def load(folder: Path, model: ak.LlamaAdapter, llama: Any, **how: Any) -> None:
    ak.LlamaAdapter.from_pretrained(llama, saved(folder, model), **how)


def with_gradient(name: str, *names: str) -> ak.LlamaAdapter:
    model = of(*names)
    model.base.get_parameter(name).requires_grad_(True)
    return model


def mixed(model: ak.LlamaAdapter) -> None:
    with model.mixing(["default"], torch.zeros(1, dtype=torch.int64)):
        pass


def damaged(folder: Path, name: str = "model.norm", saved_with: str = "embed_tokens") -> None:
    saved(folder, of(*saved_with.split()))
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["adapter"]["modules_to_save"] = [name]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    ak.LlamaAdapter.from_pretrained(tiny(), folder)


def resume(folder: Path, change: Callable[[dict[str, Any]], Any], model: ak.LlamaAdapter | None = None) -> None:
    """As transformers' Trainer does, from a checkpoint that ``change`` has damaged."""
    of().save_pretrained(folder, state_dict=None)
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    change(tensors)
    model = model or of()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        model.load_state_dict(tensors, strict=False)
    finally:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def rename(tensors: dict[str, Any]) -> None:
    for key in list(tensors):
        tensors[key.replace(".default.", ".b.")] = tensors.pop(key)


def describe(tensors: dict[str, Any], old: bytes, new: bytes) -> None:
    content = tensors[DESCRIBED].numpy().tobytes().replace(old, new)
    tensors[DESCRIBED] = torch.frombuffer(bytearray(content), dtype=torch.uint8)


def unloaded() -> ak.LlamaAdapter:
    model = of()
    model.unload()
    return model


DESCRIBED = "adapters.default.config"
UP = "adapters.default.2.0.up.weight"
REFUSALS: list[tuple[str, Callable[[Path], Any], type[Exception], str]] = [
    ("a string", lambda _: ak.AdapterConfig(modules_to_save="norm"), TypeError, "modules_to_save: expected a list"),
    ("unknown", lambda _: of("embed"), ValueError, r"modules_to_save: .*such as embed_tokens, norm, lm_head, got 'emb"),
    ("no parameters", lambda _: of("rotary_emb"), ValueError, "modules_to_save: expected modules with parameters, got"),
    (
        "a count",
        lambda _: of("lm_head", llama=with_head(torch.nn.BatchNorm1d(32))),
        ValueError,
        "modules_to_save: expected a module that saves floating point alone, got 'lm_head', whose num_batches",
    ),
    ("a layer", lambda _: of("layers.1"), ValueError, "modules_to_save: expected modules inside or beside the layers"),
    ("all layers", lambda _: of("model"), ValueError, "modules_to_save: expected modules inside or beside the layers"),
    ("mixed", lambda _: mixed(of("norm")), ValueError, "modules_to_save: expected none .* got model.norm of 'default'"),
    (
        "a gradient",
        lambda p: with_gradient("lm_head.weight").save_pretrained(p),
        ValueError,
        r"modules_to_save: the backbone's parameter lm_head\.weight requires a gradient and would not be saved",
    ),
    (
        "another gradient",
        lambda p: with_gradient("model.norm.weight", "embed_tokens").save_pretrained(p),
        ValueError,
        r"modules_to_save: the backbone's parameter model\.norm\.weight requires",
    ),
    (
        "resized after",
        lambda _: of("embed_tokens").resize_token_embeddings(140),
        ValueError,
        "resize_token_embeddings: expected no adapter that trains the embeddings.*new_num_tokens=140",
    ),
    (
        "smaller vocabulary",
        lambda p: load(p, of("embed_tokens", llama=resized(140)), tiny()),
        ValueError,
        r"adapterkern\.json: saved for a vocabulary of 140 tokens, and loaded on one of 128 .*resize_token_embeddings=",
    ),
    (
        "another vocabulary, strict",
        lambda p: load(p, of(llama=resized(140)), tiny(), strict=True),
        ValueError,
        "saved for a vocabulary of 140 tokens, and loaded on one of 128",
    ),
    (
        "a head's adapter on a language model, strict",
        lambda p: load(p, ak.LlamaAdapter(classifier()), tiny(), strict=True),
        ValueError,
        r"adapterkern\.json: modules_to_save: expected modules of LlamaForCausalLM, got 'score'",
    ),
    (
        "a head without tensors",
        lambda p: damaged(p, "score", ""),
        ValueError,
        r"adapterkern.safetensors: tensors modules_to_save.score: expected by its configuration, got none",
    ),
    (
        "another number of labels",
        lambda p: load(p, ak.LlamaAdapter(classifier()), classifier(3)),
        ValueError,
        r"tensor modules_to_save\.score\.weight: expected \(3, 32\) .*, got \(2, 32\)",
    ),
    (
        "damaged",
        damaged,
        ValueError,
        r"tensor modules_to_save\.model\.\w+\.weight: (not )?expected by its configuratio",
    ),
    (
        "no path",
        lambda p: damaged(p, "norm", ""),
        ValueError,
        r"adapterkern\.json: modules_to_save: expected paths of modules, got 'norm'",
    ),
    (
        "a checkpoint of another adapter",
        lambda p: resume(p, rename),
        ValueError,
        "name: the run was begun with the adapter 'b', which this model does not have, got 'default': name it so",
    ),
    (
        "a checkpoint of another shape",
        lambda p: resume(p, lambda t: None, of(llama=tiny(hidden_size=48))),
        ValueError,
        f"the checkpoint's {DESCRIBED}: .* saved for a backbone of hidden_size=32 .* got one of hidden_size=48",
    ),
    (
        "a checkpoint without a tensor",
        lambda p: resume(p, lambda t: t.pop(UP)),
        ValueError,
        r"the checkpoint: tensor 2\.0\.up\.weight: expected by its configuration",
    ),
    (
        "a checkpoint with another tensor",
        lambda p: resume(p, lambda t: t.update({"adapters.default.0.norm": torch.ones(2)})),
        ValueError,
        r"the checkpoint: tensor 0\.norm: not expected by its configuration",
    ),
    (
        "a checkpoint with a tensor of another shape",
        lambda p: resume(p, lambda t: t.update({UP: torch.ones(32, 5)})),
        ValueError,
        r"the checkpoint: tensor 2\.0\.up\.weight: expected \(32, 4\) of floating point .*, got \(32, 5\)",
    ),
    (
        "a checkpoint whose configuration is no bytes",
        lambda p: resume(p, lambda t: t.update({DESCRIBED: torch.ones(3) / 2})),
        ValueError,
        rf"the checkpoint's {DESCRIBED}: expected the bytes of adapterkern\.json, got \(3,\) of torch\.float32",
    ),
    (
        "a checkpoint whose configuration is cut",
        lambda p: resume(p, lambda t: t.update({DESCRIBED: t[DESCRIBED][:50]})),
        ValueError,
        f"the checkpoint's {DESCRIBED}: not a JSON file: ",
    ),
    (
        "a checkpoint with a field that nobody knows",
        lambda p: resume(p, lambda t: describe(t, b"x_free", b"x_fred")),
        ValueError,
        f"the checkpoint's {DESCRIBED}: x_fred: unknown field; expected one of ",
    ),
    (
        "a checkpoint of another version",
        lambda p: resume(p, lambda t: describe(t, b'"format_version": 1', b'"format_version": 2')),
        ValueError,
        f"the checkpoint's {DESCRIBED}: expected format_version 1, got 2",
    ),
    (
        "a checkpoint after unload",
        lambda p: resume(p, lambda t: None, unloaded()),
        RuntimeError,
        r"unload\(\) has taken them off",
    ),
    (
        "AdapterHub",
        lambda p: of("norm").save_adapterhub(p),
        ValueError,
        "modules_to_save: expected none for AdapterHub",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_is_refused(tmp_path: Path, call: Callable[[Path], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(tmp_path)


def test_another_vocabulary_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tmp_path, of(llama=resized(140)), tiny())
    assert "saved for a vocabulary of 140 tokens, and loaded on one of 128" in caplog.text
