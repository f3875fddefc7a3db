"""``modules_to_save``: what is trained besides the adapter is saved, loaded, resumed and switched with it."""

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

import adapterkern as ak
from adapterkern.model.extra import default_heads
from adapterkern.model.files.folder import WEIGHTS_NAME
from tests.support import families
from tests.support.tiny_llama import IDS, LEFT_PADDED, draw, logits, tiny

ROWS = [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(torch.randint(1, 128, (16, 6)))]


def classifier(cls: Any = LlamaForSequenceClassification, seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    return cls(tiny(num_labels=2, **fields).config).eval()


def model(llama: Any = None, **config: Any) -> ak.LlamaAdapter:
    made = ak.LlamaAdapter(llama or tiny(), ak.AdapterConfig(**{"adapter_dim": 4, "layers": [2]} | config))
    draw(made)
    return made.eval()


def with_embeddings(tied: bool = False, **config: Any) -> ak.LlamaAdapter:
    return model(tiny(tie_word_embeddings=tied), modules_to_save=["embed_tokens"], **config)


def test_the_heads_that_a_class_brings() -> None:
    assert default_heads(tiny()) == default_heads(tiny(tie_word_embeddings=True)) == ()
    assert default_heads(families.tiny("ModernBertDecoderForCausalLM")) == ()
    assert default_heads(classifier()) == ("score",)
    assert default_heads(classifier(LlamaForTokenClassification)) == ("score",)


def test_a_language_model_has_none_and_its_configuration_stays() -> None:
    assert model().adapter_config() == ak.AdapterConfig(adapter_dim=4, layers=(2,))


def test_a_head_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    adapted = model(classifier())
    score = adapted.base.score
    assert adapted.adapter_config().modules_to_save == ("score",)
    assert [p.shape for p in adapted.adapter_parameters()][-1] == (2, 32)
    assert all(p.requires_grad for p in adapted.adapter_parameters())
    before = score._parameters["weight"].clone()
    optimizer = ak.ClippedAdamW(adapted.adapter_parameters(), lr=0.1)
    adapted(IDS, attention_mask=LEFT_PADDED, labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    assert not torch.equal(score.weight, before)
    assert torch.equal(score._parameters["weight"], before)  # the backbone's own
    adapted.save_pretrained(tmp_path)
    assert "modules_to_save.score.weight" in load_file(tmp_path / WEIGHTS_NAME)
    fresh = classifier(seed=9)
    fresh.model.load_state_dict(adapted.base.model.state_dict())
    assert torch.equal(logits(ak.LlamaAdapter.from_pretrained(fresh, tmp_path).eval()), logits(adapted))
    assert torch.equal(adapted.unload().score.weight, before)


def test_copies_are_switched_with_their_adapters() -> None:
    adapted = model(classifier())
    expected = logits(adapted)
    with torch.no_grad(), adapted.disable_adapter():
        bare = logits(adapted)
    assert torch.equal(bare, logits(classifier()))
    adapted.add_adapter("second", ak.AdapterConfig(adapter_dim=4, layers=[2]))
    adapted.adapters["second"].load_state_dict(adapted.adapters["default"].state_dict())
    adapted.add_adapter("frozen", ak.AdapterConfig(adapter_dim=4, layers=[2], modules_to_save=[]))
    adapted.set_adapter("second")
    with torch.no_grad():
        adapted.base.score.weight.add_(1)
    assert not torch.equal(logits(adapted), expected)
    adapted.set_adapter("frozen")
    assert torch.equal(logits(adapted), bare)  # the identity adapter and the backbone's head
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), expected)
    adapted.delete_adapter("default")
    assert torch.equal(logits(adapted), bare)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens(tmp_path: Path, tied: bool) -> None:
    llama = tiny(tie_word_embeddings=tied)
    llama.resize_token_embeddings(140, mean_resizing=False)
    adapted = model(llama, modules_to_save=["embed_tokens", *(["lm_head"] if tied else [])])
    ids = torch.tensor([[5, 139, 7]])
    with torch.no_grad():
        adapted.base.get_input_embeddings().weight[128:] += 1
        expected = adapted(ids).logits
        adapted.save_pretrained(tmp_path)
        assert [key for key in load_file(tmp_path / WEIGHTS_NAME) if "embed" in key or "head" in key] == [
            "modules_to_save.model.embed_tokens.weight"
        ]
        loaded = ak.LlamaAdapter.from_pretrained(
            tiny(tie_word_embeddings=tied), tmp_path, strict=True, resize_token_embeddings=True
        )
        got = loaded.eval()(ids).logits
    # An LM head that is not tied has random rows for the new tokens, which nothing has trained.
    assert torch.equal(*(t if tied else t[..., :128] for t in (got, expected)))


def test_embeddings_whose_adapter_is_deleted_can_be_resized() -> None:
    adapted = model(modules_to_save=["embed_tokens"])
    adapted.add_adapter("head", ak.AdapterConfig(adapter_dim=4, layers=[2], modules_to_save=["lm_head"]))
    adapted.delete_adapter("default")
    adapted.set_adapter("head")
    with torch.no_grad():
        adapted.lm_head.weight.zero_()
    assert not logits(adapted).any()  # the other adapter's copy still runs
    adapted.delete_adapter("head")
    adapted.resize_token_embeddings(140, mean_resizing=False)
    assert adapted.base.model.embed_tokens.weight.shape[0] == 140


def test_a_deleted_adapter_leaves_the_copies_of_others_as_they_run() -> None:
    """Even where a module's forward has been replaced since, so that it could not be prepared again."""
    adapted = model(modules_to_save=["lm_head"])
    adapted.add_adapter("b", ak.AdapterConfig(adapter_dim=4, layers=[2], modules_to_save=["lm_head", "norm"]))
    adapted.set_adapter("b")
    with torch.no_grad():
        adapted.lm_head.weight += 1
    forward = adapted.base.lm_head.forward
    adapted.base.lm_head.forward = lambda *args: forward(*args)
    expected = logits(adapted)
    adapted.delete_adapter("default")
    assert torch.equal(logits(adapted), expected)


class Masked(torch.nn.Linear):
    """A head of which some outputs are ruled out."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__(32, 128, bias=False)
        self.register_buffer("mask", torch.zeros(128).index_fill(0, torch.tensor([3, 5]), -torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.mask


def test_infinite_values_of_a_mask_are_loaded(tmp_path: Path) -> None:
    llama = tiny()
    llama.lm_head = Masked()
    adapted = model(llama, modules_to_save=["lm_head"])
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = ak.LlamaAdapter.from_pretrained(adapted.unload(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    assert (expected == -torch.inf).sum() == 2 * expected[..., 0].numel()


def test_tied_embeddings_stay_tied() -> None:
    adapted, untied = with_embeddings(tied=True), with_embeddings()
    assert adapted.base.lm_head.weight is adapted.base.model.embed_tokens.weight
    assert untied.base.lm_head.weight is untied.base.lm_head._parameters["weight"]
    assert (
        with_embeddings(True, layers=[1]).adapter_config()
        == model(tiny(tie_word_embeddings=True), layers=[1], modules_to_save=["lm_head"]).adapter_config()
    )
    adapted(IDS, labels=IDS).loss.backward()
    copied = adapted.base.lm_head.weight
    plain = tiny(tie_word_embeddings=True)
    with torch.no_grad():
        plain.model.embed_tokens.weight.copy_(copied)
    expected = model(plain)
    expected.adapters.load_state_dict({k: v for k, v in adapted.adapters.state_dict().items() if "modules" not in k})
    plain.model.embed_tokens.weight.requires_grad_(True)
    expected(IDS, labels=IDS).loss.backward()
    assert torch.allclose(copied.grad, plain.model.embed_tokens.weight.grad, atol=1e-6)
    adapted.tie_weights()
    assert adapted.base.lm_head._parameters["weight"] is adapted.base.model.embed_tokens._parameters["weight"]
    assert adapted.base.lm_head._parameters["weight"] is not copied


@pytest.mark.parametrize(
    ("name", "frozen"), [("embed_tokens", 0), ("layers.1.mlp", 1), ("mlp", 0), ("model.norm", 3), ("lm_head", 3)]
)
def test_the_prefix_ends_below_what_is_trained(name: str, frozen: int) -> None:
    adapted = model(modules_to_save=[name])
    assert adapted.prefix_length == frozen
    with torch.no_grad():
        for p in adapted.adapter_parameters():
            p.add_(0.1 * torch.randn(p.shape))
        whole = adapted.decoder(IDS).last_hidden_state
        if name != "embed_tokens":
            assert torch.allclose(adapted.run_suffix(adapted.run_prefix(IDS)), whole, atol=1e-6)
    with adapted.disable_adapter():
        assert adapted.prefix_length == 4


@pytest.mark.parametrize("name", ["score", "model.layers.3.mlp", "norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_copies_compute_in_fp32_and_outputs_keep_their_dtype(name: str, dtype: torch.dtype) -> None:
    adapted = model(classifier().to(dtype), modules_to_save=[name])
    kinds = {p.dtype for key, p in adapted.adapters.named_parameters() if "modules_to_save" in key}
    assert kinds == {torch.promote_types(dtype, torch.float32)}
    with torch.no_grad():
        states = adapted.decoder(IDS, output_hidden_states=True).hidden_states
    assert {state.dtype for state in (*states, logits(adapted))} == {dtype}


@pytest.mark.parametrize("how", ["hooks", "offloaded", "device map"])
def test_a_backbone_with_accelerate_s_hooks(tmp_path: Path, how: str) -> None:
    plain = model(classifier(), modules_to_save=["embed_tokens"])
    with torch.no_grad():
        for p in plain.adapter_parameters():
            p.add_(0.1)
    plain.save_pretrained(tmp_path)
    llama = classifier()
    if how == "offloaded":
        accelerate.cpu_offload(llama, execution_device=torch.device("cpu"))
    elif how == "device map":
        devices = {"model": "cpu", "score": "cpu"}
        accelerate.dispatch_model(llama, devices, main_device="cpu", force_hooks=True)
    else:
        for module in (llama.model.embed_tokens, llama.score):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    adapted = ak.LlamaAdapter.from_pretrained(llama, tmp_path, strict=True).eval()
    assert torch.equal(logits(adapted), logits(plain))
    adapted.save_pretrained(tmp_path / "again")
    again = ak.LlamaAdapter.from_pretrained(classifier(), tmp_path / "again", strict=True).eval()
    assert torch.equal(logits(again), logits(plain))
    assert torch.equal(logits(adapted.unload()), logits(classifier()))


def test_deep_copies_and_compiled_forwards() -> None:
    adapted = model(classifier(), modules_to_save=["embed_tokens"])
    expected = logits(adapted)
    twin = copy.deepcopy(adapted)
    with torch.no_grad():
        twin.base.score.weight.add_(1)
    assert torch.equal(logits(adapted), expected)
    assert not torch.equal(logits(twin), expected)
    compiled = torch.compile(adapted.base.score, backend="eager", fullgraph=True)
    states = torch.randn(2, 32)
    assert torch.equal(compiled(states), states @ adapted.base.score.weight.T)


def test_an_adapter_of_a_language_model_gets_a_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model().save_pretrained(tmp_path)
    loaded = ak.LlamaAdapter.from_pretrained(classifier(), tmp_path)
    assert loaded.adapter_config().modules_to_save == ("score",)
    assert "score: not saved with the adapter" in caplog.text


def test_an_adapter_of_a_classifier_on_a_language_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = model(classifier(), modules_to_save=["norm"])
    trained.save_pretrained(tmp_path)
    loaded = ak.LlamaAdapter.from_pretrained(tiny(), tmp_path)
    assert loaded.adapter_config().modules_to_save == ("model.norm",)
    for name, tensor in loaded.adapters["default"].state_dict().items():
        assert torch.equal(tensor, trained.adapters["default"].state_dict()[name]), name
    assert "score, trained with the adapter, is not loaded, since LlamaForCausalLM has none" in caplog.text


# transformers' Trainer and TRL


def trainer(folder: Path, adapted: ak.LlamaAdapter, cls: Any = transformers.Trainer, **more: Any) -> Any:
    how = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-2, "report_to": [], "use_cpu": True}
    how |= {"save_strategy": "steps", "save_steps": 3, "disable_tqdm": True, "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(str(folder), **how)
    return cls(adapted, arguments, train_dataset=ROWS, **more)


def test_trainer_resumes_a_head_to_the_bit(tmp_path: Path) -> None:
    adapted = model(classifier(), modules_to_save=["embed_tokens"])
    trainer(tmp_path, adapted).train()
    resumed = model(classifier(), modules_to_save=["embed_tokens"])
    trainer(tmp_path, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    pairs = zip(adapted.adapter_parameters(), resumed.adapter_parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    loaded = ak.LlamaAdapter.from_pretrained(classifier(), tmp_path / "checkpoint-6", strict=True).eval()
    assert torch.equal(logits(loaded), logits(adapted.eval()))
    original = classifier()
    assert all(torch.equal(p, original.state_dict()[key]) for key, p in adapted.base.state_dict().items())


@pytest.mark.slow
def test_reward_trainer_trains_and_saves_the_head(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from tests.support import tiny_run

    tokenizer = tiny_run.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    adapted = model(LlamaForSequenceClassification(tiny(num_labels=1, pad_token_id=2).config))
    before = adapted.base.score.weight.detach().clone()
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_list([{"chosen": "w1 w2 w3", "rejected": "w4 w5"}] * 8)
    how = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = trl.RewardConfig(str(tmp_path), save_strategy="no", learning_rate=1e-2, bf16=False, **how)
    run = trl.RewardTrainer(adapted, args=arguments, train_dataset=rows, processing_class=tokenizer)
    run.train()
    assert not torch.equal(adapted.base.score.weight, before)
    run.save_model(str(tmp_path / "saved"))
    assert "modules_to_save.score.weight" in load_file(tmp_path / "saved" / WEIGHTS_NAME)


def test_a_quantized_backbone_s_head_is_trained(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    classifier(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load() -> Any:
        return LlamaForSequenceClassification.from_pretrained(
            tmp_path / "base", quantization_config=how, device_map="cpu", dtype=torch.float32
        )

    adapted = model(load())
    trainer(tmp_path / "run", adapted).train()
    loaded = ak.LlamaAdapter.from_pretrained(load(), tmp_path / "run" / "checkpoint-6", strict=True).eval()
    states: list[Tensor] = [p for p in adapted.adapter_parameters() if p.shape == (2, 64)]
    assert len(states) == 1
    assert torch.equal(loaded.base.score.weight, states[0])
    with pytest.raises(ValueError, match=r"modules_to_save: expected a module that is not quantized, got '.*q_proj'"):
        loaded.add_adapter("more", ak.AdapterConfig(modules_to_save=["q_proj"]))
