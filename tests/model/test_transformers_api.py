"""What transformers and others do with any model, done to a LlamaAdapter: right, or refused by name."""

import copy
import io
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, pipeline

import adapterkern as ak
from tests.support.tiny_llama import IDS, adapted, draw, grads, logits, tiny

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<pad>", pad_token="<pad>", eos_token="</s>")


GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def test_a_text_generation_pipeline(capfd: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    run = pipeline("text-generation", model=model, tokenizer=tokenizer())
    expected = model.generate(torch.tensor([[5, 6, 7]]), **GREEDY)[0, 3:].tolist()
    (result,) = run("w5 w6 w7", **GREEDY, return_full_text=False)
    assert tokenizer().encode(result["generated_text"], add_special_tokens=False) == expected
    assert "is not supported" not in capfd.readouterr().err


def test_an_assistant() -> None:
    """Assisted generation is exact for any assistant; here one with an adapter, and with a bare main model."""
    model, bare = adapted(), tiny()
    ids = IDS[:1]
    assert torch.equal(bare.generate(ids, assistant_model=model, **GREEDY), bare.generate(ids, **GREEDY))
    assert torch.equal(model.generate(ids, assistant_model=bare, **GREEDY), model.generate(ids, **GREEDY))
    assert model.can_generate()
    assert not ak.LlamaAdapter.can_generate()  # the class, of no backbone


def test_the_head_is_the_backbone_s_also_when_assigned() -> None:
    model = adapted()
    assert model.lm_head is model.base.lm_head
    assert model.model is model.base.model
    keys = set(model.state_dict())
    model.lm_head = nn.Linear(32, 7, bias=False)
    assert logits(model).shape[-1] == 7
    assert set(model.state_dict()) == keys
    with pytest.raises(AttributeError, match="no attribute 'lm_heat'"):
        _ = model.lm_heat


def reloaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [reloaded, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_can_be_pickled(how: Any, checkpointing: bool) -> None:
    model = adapted().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    other = how(model)
    assert type(other) is type(model)
    assert torch.equal(logits(other), logits(model))
    for a, b in zip(grads(other), grads(model), strict=True):
        assert torch.equal(a, b)
    draw(other)
    assert not torch.equal(logits(other), logits(model))  # its own adapters
    assert torch.equal(logits(other.unload()), logits(tiny()))
    assert torch.equal(logits(how(model.base)), logits(model))
    layer: Any = how(model.layers[1])
    assert type(layer) is type(model.layers[1])


def _logits(model: ak.LlamaAdapter, queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(logits(model).numpy())


@pytest.mark.slow
def test_a_spawned_process_gets_the_model() -> None:
    context = multiprocessing.get_context("spawn")
    queue, model = context.Queue(), adapted()
    process = context.Process(target=_logits, args=(model, queue))
    process.start()
    got = queue.get(timeout=120)
    process.join()
    torch.testing.assert_close(torch.from_numpy(got), logits(model))


def test_torchao_over_the_whole_model(tmp_path: Path) -> None:
    model = adapted(adapter_dim=8)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    site: Any = model.adapters["default"]
    assert type(site["1"][0].down.weight) is not nn.Parameter
    expected = logits(model)
    torch.testing.assert_close(_mixed(model), expected)
    model.save_pretrained(tmp_path)
    again = adapted()
    torchao.quantize_(again.base, torchao.Int8WeightOnlyConfig())
    again.load_adapter(tmp_path, "saved")
    again.set_adapter("saved")
    torch.testing.assert_close(logits(again), expected)


def _mixed(model: ak.LlamaAdapter) -> Tensor:
    with model.mixing(["default"], torch.zeros(3, dtype=torch.int64)):
        return logits(model)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_dynamic_quantization_replaces_modules(tmp_path: Path) -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model = quantize(adapted(), {nn.Linear}, dtype=torch.qint8)
    for call in (lambda: logits(model), lambda: _mixed(model), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(TypeError, match=r"adapter\.down: expected an nn\.Linear, got torch\.ao.*model\.base"):
            call()
    assert not list(tmp_path.iterdir())
    model = adapted()
    before = logits(model)
    quantize(model.base, {nn.Linear}, dtype=torch.qint8, inplace=True)
    torch.testing.assert_close(logits(model), before, atol=0.05, rtol=0)
    assert not torch.equal(logits(model), before)


def test_settings_reach_the_backbone() -> None:
    model = adapted()
    model.set_attn_implementation("eager")
    assert model.base.model.config._attn_implementation == "eager"
    assert model.get_decoder() is model.base.model
    model.resize_token_embeddings(140)
    assert model.base.vocab_size == model.base.config.vocab_size == 140
    assert logits(model).shape[-1] == 140
    assert "vocab_size" not in vars(model)
    assert not any(p.requires_grad for p in model.base.parameters())
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


def test_the_tensors_of_an_adapter() -> None:
    model = adapted()
    tensors = model.get_adapter_state_dict()
    assert set(tensors) == set(model.adapters["default"].state_dict())
    assert all(tensors[key].data_ptr() == p.data_ptr() for key, p in model.adapters["default"].named_parameters())
    doubled = {key: 2 * value for key, value in model.state_dict().items()}
    assert torch.equal(model.get_adapter_state_dict("default", doubled)["1.0.up.weight"], 2 * tensors["1.0.up.weight"])


def test_a_question_answering_backbone_has_its_own_labels() -> None:
    """Trainer finds them by the name of the class."""
    torch.manual_seed(0)
    llama = transformers.MistralForQuestionAnswering(transformers.MistralConfig(**_SMALL)).eval()
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=4))
    assert transformers.utils.find_labels(type(model)) == ["start_positions", "end_positions"]
    assert transformers.utils.find_labels(type(adapted())) == ["labels"]


_SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_it_is_shown_as_an_adapter_over_its_backbone() -> None:
    assert repr(adapted()).startswith("LlamaAdapter of LlamaForCausalLM(\n  (base): LlamaForCausalLM(")
