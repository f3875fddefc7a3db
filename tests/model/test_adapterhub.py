"""AdapterHub's files, both ways, against what its library ``adapters`` 1.3.0 wrote and computed.

golden/adapterhub/ holds a tiny LLaMA, adapters that the library saved for it, and the library's logits;
golden/make_adapterhub.py made them, and with ``check`` shows that the library loads what is written here.
"""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkern as ak
from adapterkern.model.files.adapterhub import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME

GOLDEN = Path(__file__).parents[1] / "golden" / "adapterhub"
LOGITS = load_file(GOLDEN / "logits.safetensors")
IDS = (torch.arange(24) * 7 % 16).view(2, 12)
CONFIGS = {
    "layer": ak.AdapterConfig(adapter_dim=3, layers=(0, 2)),
    "attention": ak.AdapterConfig(adapter_dim=2, layers=(0, 1, 2), position="attention", activation="gelu"),
    "mapping": ak.AdapterConfig(adapter_dim=2, layers=(0, 1), activation="identity"),
    "added_once": ak.AdapterConfig(adapter_dim=5, layers=(0, 1, 2), activation="relu"),
    "scaled": ak.AdapterConfig(adapter_dim=5, layers=(0, 1, 2), layer_norm=False, scale=0.5),
    "parallel": ak.AdapterConfig(
        adapter_dim=5, layers=(1, 2), position="parallel-mlp", activation="relu", layer_norm=False, scale=4.0
    ),
    "parallel_attention": ak.AdapterConfig(
        adapter_dim=2, layers=(0, 1, 2), position="parallel-attention", activation="relu", learned_scale=True
    ),
}


def llama() -> Any:
    shape = {"vocab_size": 16, "hidden_size": 10, "intermediate_size": 8, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 1, "max_position_embeddings": 16, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()
    model.load_state_dict(load_file(GOLDEN / "llama.safetensors"), strict=False)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def copied(directory: Path, name: str = "layer", **changes: Any) -> Path:
    """A golden folder whose ``config`` has these fields."""
    shutil.copytree(GOLDEN / name, directory / name)
    path = directory / name / CONFIG_NAME
    saved = json.loads(path.read_text())
    saved["config"] |= changes
    path.write_text(json.dumps(saved))
    return directory / name


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path / BIN_NAME, weights_only=True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["bin", "safetensors", "safetensors without aliases"])
def test_reads_what_the_library_saved(tmp_path: Path, name: str, kind: str) -> None:
    directory = copied(tmp_path, name)
    if kind != "bin":
        alias = "down.0" if "alias" in kind and CONFIGS[name].layer_norm else None
        tensors = {k: t.clone() for k, t in weights(directory).items() if alias is None or alias not in k}
        save_file(tensors, directory / SAFETENSORS_NAME)
        (directory / BIN_NAME).unlink()
    model = ak.LlamaAdapter.from_adapterhub(llama(), directory).eval()
    assert model.adapter_config() == CONFIGS[name]
    torch.testing.assert_close(logits(model), LOGITS[name], rtol=0, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), LOGITS["bare"], rtol=0, atol=1e-5)
    assert (LOGITS[name] - LOGITS["bare"]).abs().max() > 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("safetensors", [False, True])
def test_writes_what_the_library_wrote(tmp_path: Path, name: str, safetensors: bool) -> None:
    """Key for key and bit for bit, fields of the same effect apart."""
    model = ak.LlamaAdapter(llama(), ak.AdapterConfig(layers=[1]))
    model.load_adapterhub(GOLDEN / name, name)
    for other in (not safetensors, safetensors):  # the second takes the first's place
        model.save_adapterhub(tmp_path, name, safetensors=other)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG_NAME, SAFETENSORS_NAME if safetensors else BIN_NAME}

    found = load_file(tmp_path / SAFETENSORS_NAME) if safetensors else weights(tmp_path)
    expected = weights(GOLDEN / name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in found)

    ours, theirs = (json.loads((path / CONFIG_NAME).read_text()) for path in (tmp_path, GOLDEN / name))
    factor = ours["config"].pop("reduction_factor")
    assert int(10 // factor) == CONFIGS[name].adapter_dim
    same = ("original_ln_after", "residual_before_ln") if name == "added_once" else ()
    for fields in (ours["config"], theirs["config"]):
        assert fields.pop("init_weights") in ("bert", "mam_adapter")  # of no effect once drawn
    for fields in (ours["config"], theirs["config"]):
        fields.pop("reduction_factor", None)
        assert len(fields) == 31
        assert len({fields.pop(field) for field in same}) <= 1
    assert ours == theirs


def test_any_dimension_survives(tmp_path: Path) -> None:
    """The files have the dimension only as a factor, whose division rounds."""
    model = ak.LlamaAdapter(llama(), ak.AdapterConfig(layers=[0]))
    for dim in (*range(1, 40), 511, 512):
        model.add_adapter("a", ak.AdapterConfig(adapter_dim=dim, layers=[1], init="xavier"))
        model.save_adapterhub(tmp_path, "a")
        model.load_adapterhub(tmp_path, "b")
        assert model.adapter_config("b") == ak.AdapterConfig(adapter_dim=dim, layers=(1,))
        assert all(map(torch.equal, model.adapter_parameters("a"), model.adapter_parameters("b")))
        model.delete_adapter("a")
        model.delete_adapter("b")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("ln_before", 1, "ln_before: expected True or False, got 1"),
        ("ln_after", True, "ln_after: expected False, .* got True"),
        ("original_ln_before", False, "original_ln_before: expected True, got False"),
        ("original_ln_after", False, "residual_before_ln: expected False as original_ln_after, got True"),
        ("original_ln_after", None, "original_ln_after: expected True or False, got None"),
        ("residual_before_ln", "post_add", "residual_before_ln: expected True as original_ln_after, got 'post_add'"),
        ("is_parallel", 1, "is_parallel: expected True or False, got 1"),
        ("scaling", True, "scaling: expected a number or 'learned', got True"),
        ("scaling", "channel", "scaling: expected a number or 'learned', got 'channel'"),
        ("use_gating", True, "use_gating: expected False, .* got True"),
        ("inv_adapter", "nice", "inv_adapter: expected None, .* got 'nice'"),
        ("dropout", 0.1, r"dropout: expected 0\.0, .* got 0\.1"),
        ("phm_layer", True, "phm_layer: expected False, .* got True"),
        ("stochastic_depth", 0.5, r"stochastic_depth: expected 0\.0, .* got 0\.5"),
        ("mh_adapter", True, "mh_adapter: expected one of mh_adapter and output_adapter, got both True"),
        ("output_adapter", False, "mh_adapter: expected one of .* got both False"),
        ("output_adapter", "no", "output_adapter: expected True or False, got 'no'"),
        ("non_linearity", "gelu_new", "non_linearity: expected one of silu, swish, gelu, .* got 'gelu_new'"),
        ("non_linearity", None, "non_linearity: expected one of .* got None"),
        ("non_linearity", ["silu"], r"non_linearity: expected one of .* got \['silu'\]"),
        ("reduction_factor", 0, "reduction_factor: expected a number > 0 for each layer, got 0"),
        ("reduction_factor", 1e-300, "reduction_factor: expected a number > 0"),
        ("reduction_factor", {"0": 2}, "reduction_factor: expected a number > 0 for each layer"),
        ("reduction_factor", {"0": 2, "default": 5}, r"reduction_factor: expected one dimension .* got \[2, 5\]"),
        ("reduction_factor", 0.01, "adapter_dim: expected an integer from 1 to 512, got 999"),
        ("leave_out", [0, 1, 2], r"leave_out: expected to keep one of 3 layers, got \[0, 1, 2\]"),
        ("leave_out", "0", "leave_out: expected a list of layer numbers, got '0'"),
        ("architecture", "lora", "architecture: expected a bottleneck adapter's None, got 'lora'"),
        ("rank", 8, "rank: expected no such field, got 8"),
    ],
)
def test_another_operator_is_refused_by_field(tmp_path: Path, field: str, value: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"{CONFIG_NAME}: {problem}"):
        ak.LlamaAdapter.from_adapterhub(llama(), copied(tmp_path, **{field: value}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": 12}, "hidden_size: expected the backbone's 10, got 12"),
        ({"name": None}, "name: expected a string without dots, got None"),
        ({"config": "seq_bn"}, "config: expected an object of fields, got 'seq_bn'"),
        ({"config": {"ln_before": True}}, "original_ln_before: expected a value, got none"),
    ],
)
def test_fields_outside_config_are_checked_too(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = copied(tmp_path)
    saved = json.loads((path / CONFIG_NAME).read_text())
    (path / CONFIG_NAME).write_text(json.dumps(saved | changes))
    with pytest.raises(ValueError, match=rf"{CONFIG_NAME}: {problem}"):
        ak.LlamaAdapter.from_adapterhub(llama(), path)


def test_a_parallel_adapter_leaves_the_residual_to_the_layer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="original_ln_after: expected True of a parallel adapter, got False"):
        ak.LlamaAdapter.from_adapterhub(llama(), copied(tmp_path, "parallel", original_ln_after=False))


def test_files_without_a_version_mean_another_gelu(tmp_path: Path) -> None:
    """The library renamed it when it began to write its version."""
    path = copied(tmp_path, "attention")
    saved = json.loads((path / CONFIG_NAME).read_text())
    del saved["version"]
    (path / CONFIG_NAME).write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"non_linearity: expected .* got 'gelu_new'"):
        ak.LlamaAdapter.from_adapterhub(llama(), path)
    saved["config"]["non_linearity"] = "gelu_orig"
    (path / CONFIG_NAME).write_text(json.dumps(saved))
    assert ak.LlamaAdapter.from_adapterhub(llama(), path).adapter_config().activation == "gelu"


PREFIX = "model.layers.0.output_adapters.adapters.layer."


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({PREFIX + "adapter_up.bias": None}, r"layer 0: adapter_up.bias: expected \(10,\) .*, got none"),
        ({PREFIX + "adapter_up.bias": torch.ones(9)}, r"adapter_up.bias: expected \(10,\) .*, got \(9,\)"),
        ({PREFIX + "adapter_up.bias": torch.ones(10).long()}, "expected .* floating point, got .*int64"),
        ({PREFIX + "adapter_down.0.bias": torch.ones(10)}, r"norm_before.bias: expected the same as adapter_down\.0"),
        ({PREFIX + "gate.weight": torch.ones(1)}, "layer 0: gate.weight: expected no such tensor"),
        ({"shared_parameters.layer.x": torch.ones(1)}, "expected only keys of output_adapters.adapters.layer"),
        ({PREFIX.replace("0", "3") + "adapter_up.bias": torch.ones(10)}, "layer 3: expected adapters of layers"),
        ({PREFIX + "adapter_up.bias": "text"}, "expected a mapping from names to tensors"),
        ({PREFIX + "adapter_up.bias": torch.ones(10).to_sparse()}, "expected plain numbers, got torch.sparse_coo"),
        ({PREFIX + "adapter_up.bias": torch.ones(10, device="meta")}, "expected plain numbers, got .* on meta"),
        ({PREFIX + "adapter_up.bias": torch.full((10,), torch.nan)}, "adapter_up.bias: expected finite values, got 10"),
        (
            {PREFIX + "adapter_up.bias": torch.full((10,), 1e300, dtype=torch.float64)},
            "adapter_up.bias: expected finite values",
        ),
        ({PREFIX + "adapter_up.bias": torch.ones(10).to(torch.float8_e5m2)}, "expected 16, 32 or 64 bits of floating"),
        ({PREFIX + "adapter_down.0.bias": torch.ones(10).to(torch.float8_e5m2)}, "expected the same as adapter_down.0"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = copied(tmp_path)
    torch.save({k: t for k, t in (weights(path) | changes).items() if t is not None}, path / BIN_NAME)
    model = ak.LlamaAdapter(llama(), ak.AdapterConfig(layers=[1]))
    with pytest.raises(ValueError, match=rf"{BIN_NAME}: .*{problem}"):
        model.load_adapterhub(path, "new")
    assert list(model.adapters) == ["default"]


def zipped(content: bytes) -> bytes:
    """As torch.save would write it, but compressed."""
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", b"3\n")
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not a file of tensors: "),
        (zipped(bytes(10**6)), "not a file of tensors: 1000002 bytes in a file of "),
        (zipped(b"\x80\x02]" + b"]" * 1000 + b"."), "not a file of tensors: "),
        (zipped(b"\x80\x02K\x01."), "not a file of tensors: |expected a mapping .*, got int"),
        (pickle.dumps({"a": 1}, 2), "not a file of tensors: "),
    ],
    ids=["empty", "a zip bomb", "nested lists", "a number", "a plain pickle"],
)
def test_any_bytes_instead_of_tensors(tmp_path: Path, content: bytes, problem: str) -> None:
    path = copied(tmp_path)
    (path / BIN_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{BIN_NAME}: ({problem})"):
        ak.LlamaAdapter.from_adapterhub(llama(), path)


@pytest.mark.parametrize(("field", "value"), [("depth", 2), ("eps", 1e-6)])
def test_what_the_library_cannot_say_is_not_written(tmp_path: Path, field: str, value: Any) -> None:
    model = ak.LlamaAdapter(llama(), ak.AdapterConfig(layers=[1], **{field: value}))
    with pytest.raises(ValueError, match=f"{field}: expected .* got {value}"):
        model.save_adapterhub(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_files(tmp_path: Path) -> None:
    path = copied(tmp_path)
    (path / BIN_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=BIN_NAME):
        ak.LlamaAdapter.from_adapterhub(llama(), path)
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        ak.LlamaAdapter.from_adapterhub(llama(), tmp_path)


def test_one_library_s_file_is_not_written_over_the_other_s(tmp_path: Path) -> None:
    """AdapterHub and PEFT call it adapter_config.json, and so did we in 0.1.0."""
    model = ak.LlamaAdapter(llama(), ak.AdapterConfig(adapter_dim=4))
    model.save_pretrained(tmp_path / "ours")
    model.save_adapterhub(tmp_path / "theirs")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / CONFIG_NAME).write_text('{"peft_type": "LORA", "r": 8}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for save, folder, owner in (
        (model.save_adapterhub, "ours", "AdapterHub"),
        (model.save_adapterhub, "peft", "AdapterHub"),
        (model.save_pretrained, "theirs", "adapterkern"),
        (model.save_pretrained, "peft", "adapterkern"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"(adapter_config|adapterkern)\.json: expected {owner}'s file or none, got another program's, "
            "with the fields",
        ):
            save(tmp_path / folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
