"""TRL's trainers with a reference that shares the backbone: the losses of an explicit copy."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import adapterkern as ak
from tests.support.tiny_llama import adapted, tiny

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

pytestmark = pytest.mark.slow  # importing TRL's trainers takes seconds

HOW: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 1,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def policy(**fields: Any) -> ak.LlamaAdapter:
    """Adapters that have been trained; a backbone that no path leads to, as one from a GGUF file."""
    torch.manual_seed(5)
    return adapted(tiny(**fields)).train()


def losses(trainer: Any) -> list[float]:
    """Of three steps; then the norms of the gradients, since RLOO's loss is 0 whatever the reference."""
    trainer.train()
    return [e[key] for key in ("loss", "grad_norm") for e in trainer.state.log_history if key in e]


def bare_copy(model: ak.LlamaAdapter) -> Any:
    return copy.deepcopy(model).unload()


def whole_copy(model: ak.LlamaAdapter) -> Any:
    return copy.deepcopy(model).requires_grad_(False).eval()


REFERENCES = [
    pytest.param(ak.LlamaAdapter.reference, bare_copy, id="bare"),
    pytest.param(lambda model: model.reference("default"), whole_copy, id="as-it-is"),
]


@pytest.mark.parametrize(("shared", "explicit"), REFERENCES)
def test_dpo(tmp_path: Path, caplog: pytest.LogCaptureFixture, shared: Any, explicit: Any) -> None:
    rows = [{"prompt": f"w{i} w9", "chosen": f"w{i + 1} w5", "rejected": "w7"} for i in range(3, 11)]

    def run(reference: Any) -> list[float]:
        model = policy()
        config = trl.DPOConfig(str(tmp_path), **HOW)
        data = datasets.Dataset.from_list(rows)
        trainer = trl.DPOTrainer(model, reference(model), config, train_dataset=data, processing_class=tokenizer())
        own = {id(p) for p in model.base.parameters()}
        shares = own <= {id(p) for p in trainer.accelerator.unwrap_model(trainer.ref_model).parameters()}
        assert shares == (reference is shared)
        return losses(trainer)

    got = run(shared)
    assert "takes as its reference" not in caplog.text
    assert got == pytest.approx(run(explicit), abs=1e-6)
    assert "DPO takes as its reference, if it has one, the backbone without adapters" in caplog.text
    assert len(set(got)) == 6
    if explicit is whole_copy:
        assert got[0] == pytest.approx(0.693147, abs=1e-5)  # ln 2: the policy begins as its reference


@pytest.mark.parametrize(("shared", "explicit"), REFERENCES)
def test_kto(tmp_path: Path, shared: Any, explicit: Any) -> None:
    rows = [{"prompt": f"w{i} w9", "completion": f"w{i + 1} w5", "label": i % 2 == 0} for i in range(3, 11)]

    def run(reference: Any) -> list[float]:
        model = policy()
        config = trl.KTOConfig(str(tmp_path), **HOW)
        data = datasets.Dataset.from_list(rows)
        return losses(trl.KTOTrainer(model, reference(model), config, train_dataset=data, processing_class=tokenizer()))

    got = run(shared)
    assert got == pytest.approx(run(explicit), abs=1e-6)
    assert len(set(got)) == 6


def use_reference(trainer: Any, reference: Any, beta: float) -> None:
    """What docs/trainer.md says for the trainers without ``ref_model=``."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(reference, temperature=trainer.temperature)
    trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    trainer.beta = beta


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
@pytest.mark.parametrize(("shared", "explicit"), REFERENCES)
def test_grpo_and_rloo(tmp_path: Path, name: str, shared: Any, explicit: Any) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) + 0.1 * text.count("w1") for text in completions]

    data = datasets.Dataset.from_list([{"prompt": f"w{i} w9"} for i in range(3, 11)])
    how = HOW | {"num_generations": 4, "max_completion_length": 6}
    (tmp_path / "base").mkdir()
    tiny().save_pretrained(tmp_path / "base")

    def trainer(model: Any, beta: float) -> Any:
        config = getattr(trl, f"{name}Config")(str(tmp_path), beta=beta, **how)
        made = getattr(trl, f"{name}Trainer")
        return made(model, reward, config, train_dataset=data, processing_class=tokenizer())

    def run(reference: Any) -> list[float]:
        model = policy()
        one = trainer(model, 0.0)
        use_reference(one, reference(model), 0.5)
        return losses(one)

    got = run(shared)
    assert got == pytest.approx(run(explicit), abs=1e-6)
    assert len(set(got[3:])) == 3
    if name == "GRPO":  # RLOO's losses are 0 but for rounding, which may give one twice
        assert len(set(got)) == 6
    assert got != pytest.approx(losses(trainer(policy(), 0.0)), abs=1e-6)  # the reference counts
    if explicit is bare_copy:  # TRL's own reference: the backbone, once more from its folder
        model = policy()
        model.config._name_or_path = str(tmp_path / "base")
        assert got == pytest.approx(losses(trainer(model, 0.5)), abs=1e-6)
