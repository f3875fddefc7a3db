"""The two tasks that learn from soft labels: what they compute, what they train, what they save."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from adapterkern.model.config import AdapterConfig
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.distillation import Distillation, KeepBehaviour, WithKept, first_layers
from adapterkern.recipes.distillation.keeping import KeptText
from adapterkern.recipes.distillation.teacher import DISTILLATION_CONFIG
from adapterkern.training import CheckpointError, TrainConfig, evaluate, train
from adapterkern.training.feed import Feed
from adapterkern.training.optimization import with_rates
from adapterkern.training.task import Task
from tests.support import tiny_llama, tiny_run
from tests.support.soft_label_reference import Allocations, plain

TOKENIZER = tiny_run.tokenizer()
TEXTS = [{"text": row["text"]} for row in tiny_run.rows(12, seed=3)]
LM = {"task": "causal-lm", "log_every": 1}


def test_a_training_step_holds_a_chunk_of_logits_at_most() -> None:
    """The whole task, backbone included: of everything made in a step, nothing has tokens × vocabulary elements."""
    model = tiny_run.model()
    config = tiny_run.quiet(**LM, padding="max_length", max_length=64)
    texts = [{"text": " ".join(row["text"] for row in TEXTS)}] * 4
    logits = 4 * 63 * 128

    def largest(task: Any, rows: Any) -> int:
        batch = Feed(task, config, None)(task.load(rows, config, TOKENIZER))
        with Allocations() as made:
            task(batch)[0].backward()
        return made.largest

    assert largest(Distillation(model, chunk_tokens=8), texts) < logits
    assert largest(Distillation(model, chunk_tokens=10**6), texts) >= logits
    rows = [{"prompt": "w1 w2", "completion": "w3"}]
    assert largest(KeepBehaviour(model, chunk_tokens=8), WithKept(rows, texts)) < logits


# The teacher


def same_shape(model: LlamaAdapter, seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = type(model.config)(**(model.config.to_dict() | changes))
    return type(model.base)(config)


def summed(model: LlamaAdapter, teacher: Any, examples: Any, temperature: float, weight: float) -> Tensor:
    """The loss of a ``Distillation``, text by text, from whole logits and without padding."""
    total = torch.zeros((), dtype=torch.float64)
    for e in examples:
        ids, targets = torch.from_numpy(e.input_ids)[None], torch.from_numpy(e.targets)
        z = model(input_ids=ids).logits[0, e.positions]
        with torch.no_grad():
            if teacher is None:
                with model.disable_adapter():
                    t = model(input_ids=ids).logits[0, e.positions]
            else:
                t = teacher(input_ids=ids).logits[0, e.positions]
        cross_entropy = F.cross_entropy(z.double(), targets, reduction="sum")
        soft = plain(z.double(), t.double(), temperature, "kl").sum()
        total = total + (1 - weight) * cross_entropy + weight * temperature**2 * soft
    return total


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["itself", "another"])
@pytest.mark.parametrize("cached", [False, True])
def test_padding_and_prompts_are_ignored(side: str, kind: str, cached: bool) -> None:
    """Against whole logits of each text alone, in loss and in every parameter's gradient."""
    model = tiny_run.model(init="xavier")
    teacher = None if kind == "itself" else same_shape(model, seed=5, hidden_size=16, num_hidden_layers=2)
    task = Distillation(model, teacher, temperature=2.0, weight=0.7, chunk_tokens=5)
    rows = [{"prompt": "w1 w2 w3", "completion": row["text"]} for row in TEXTS[:5]]
    config = tiny_run.quiet(**LM, padding_side=side)
    examples = task.load(rows, config, TOKENIZER)
    batch = Feed(task, config, None)(examples)
    if cached:
        batch["prefix"] = model.run_prefix(batch["input_ids"], batch["attention_mask"])
    parameters = model.adapter_parameters()
    loss, _ = task(batch)
    expected = summed(model, teacher, examples, 2.0, 0.7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    got = torch.autograd.grad(loss, parameters)
    for a, b in zip(got, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layers", [(0, 3), (3,)])
@pytest.mark.parametrize("position", ["layer", "attention"])
def test_a_model_is_its_own_teacher_with_adapters_off(layers: tuple[int, ...], position: str) -> None:
    """At the identity the divergence is exactly 0, and nothing pulls; a moved adapter is pulled back."""
    for init, divergence in (("identity", "kl"), ("identity", "js"), ("xavier", "kl")):
        model = tiny_run.model(layers=layers, position=position, init=init)
        task = Distillation(model, weight=1, divergence=divergence)
        config = tiny_run.quiet(**LM)
        loss, _ = task(Feed(task, config, None)(task.load(TEXTS, config, TOKENIZER)))
        gradients = torch.autograd.grad(loss, model.adapter_parameters())
        at_rest = init == "identity"
        assert (abs(loss.item()) < 1e-6) == at_rest
        assert (max(g.abs().max().item() for g in gradients) < 1e-5) == at_rest
        assert model.active_adapter == "default"


def test_the_teacher_has_no_dropout_and_learns_nothing() -> None:
    model = tiny_run.model()
    model.config.attention_dropout = 0.5
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.5
    task = Distillation(model, weight=1)
    config = tiny_run.quiet(**LM)
    batch = Feed(task, config, None)(task.load(TEXTS, config, TOKENIZER))
    task.train()
    batch["prefix"] = torch.zeros(*batch["input_ids"].shape, 32)
    first, second = (task.taught(batch) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert model.base.training
    teacher = same_shape(model, seed=1).train()
    task = Distillation(model, teacher)
    task.train()
    assert not teacher.training
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in task.parameters()}


class Scaled(GPT2LMHeadModel):
    """A model that does more to its logits than its head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


class Lengthened(GPT2LMHeadModel):
    """Its logits do not follow from its last hidden states alone."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids, **kwargs)
        if input_ids is not None:
            out.logits = out.logits + input_ids[..., None]
        return out


def test_teachers_that_do_not_fit_are_refused() -> None:
    model = tiny_run.model()
    with pytest.raises(ValueError, match="vocabulary of 128 tokens, got one of 127"):
        Distillation(model, same_shape(model, seed=1, vocab_size=127))
    with pytest.raises(ValueError, match="teacher: expected None for the model itself"):
        Distillation(model, model.base)
    with pytest.raises(ValueError, match="teacher: expected a transformers causal language model, got Linear"):
        Distillation(model, nn.Linear(2, 2))
    gpt2 = GPT2Config(vocab_size=128, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ValueError, match=r"teacher: expected logits that follow from the last .*, but Lengthened"):
        KeepBehaviour(model, Lengthened(gpt2))
    Distillation(model, GPT2LMHeadModel(gpt2))  # another architecture is fine
    with pytest.raises(TypeError, match="temprature: expected temperature in SoftLabelSettings, got temprature=2"):
        Distillation(model, temprature=2.0)
    with pytest.raises(ValueError, match=r"temperature: expected a number in \(0, inf\), got 0"):
        KeepBehaviour(model, temperature=0)


def test_a_model_that_reads_images_teaches(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = size | {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 128}
    vision = size | {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    teacher = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, image_token_index=127)
    )
    model = tiny_run.model()
    task = Distillation(model, teacher, weight=1.0)
    train(model, TEXTS, tiny_run.quiet(**LM, max_steps=1, output_dir=tmp_path), tokenizer=TOKENIZER, task=task)
    saved = json.loads((tmp_path / DISTILLATION_CONFIG).read_text())
    assert saved["teacher"] == "Gemma3ForConditionalGeneration, 3 layers"


def test_a_model_that_cannot_be_cut_teaches_itself() -> None:
    """Granite scales its embeddings. Its logits are scaled too, so the loss needs its own."""
    model = tiny_llama.adapted(tiny_llama.tiny("Granite", embedding_multiplier=12.0, logits_scaling=0.5))
    assert model.split_obstacle
    task = Distillation(model, weight=0.5)
    config = tiny_run.quiet(task="causal-lm")
    examples = task.load([{"input_ids": list(range(3, 11))}], config, None)
    loss, others = task.eval()(task.collate(examples, config))
    ids = torch.arange(3, 11)[None]
    student = model(ids).logits[0, :-1]
    with model.disable_adapter():
        teacher = model(ids).logits[0, :-1]
    cross_entropy = F.cross_entropy(student, ids[0, 1:], reduction="sum")
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
    torch.testing.assert_close(others[:2], torch.stack([cross_entropy, divergence]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, 0.5 * cross_entropy + 0.5 * divergence, rtol=1e-4, atol=1e-5)


def test_a_teacher_whose_positions_count_refuses_left_padding() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
    rope |= {"original_max_position_embeddings": 4}
    teacher = tiny_llama.tiny("Ministral3", head_dim=8, initializer_range=0.2, rope_parameters=rope)
    task = Distillation(tiny_run.model(), teacher)
    rows = [{"input_ids": list(range(3, 3 + n))} for n in (14, 5)]
    with pytest.raises(ValueError, match="padding_side: expected 'right' for Ministral3ForCausalLM"):
        train(task.model, rows, tiny_run.quiet(task="causal-lm", padding_side="left"), task=task)


def test_the_first_layers_share_the_parameters_and_not_the_adapters() -> None:
    whole = tiny_run.model().unload()
    ids = torch.randint(3, 100, (2, 7))
    before = whole(input_ids=ids).logits
    student = LlamaAdapter(first_layers(whole, 2), AdapterConfig(adapter_dim=4, init="xavier"))
    assert {p.data_ptr() for p in student.base.parameters()} < {p.data_ptr() for p in whole.parameters()}
    assert torch.equal(whole(input_ids=ids).logits, before)
    assert len(whole.model.layers) == whole.config.num_hidden_layers == 4
    assert len(student.layers) == student.config.num_hidden_layers == 2
    with student.disable_adapter():
        expected = whole.lm_head(whole.model.norm(whole(input_ids=ids, output_hidden_states=True).hidden_states[2]))
        torch.testing.assert_close(student(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="num_layers: expected an integer from 1 to 4, got 5"):
        first_layers(whole, 5)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["norm"], ["lm_head"], ["layers.0.mlp"]])
@pytest.mark.parametrize("tied", [True, False])
def test_modules_that_a_student_trains_stay_as_they_are_in_the_whole_model(modules: list[str], tied: bool) -> None:
    whole = tiny_llama.tiny(tie_word_embeddings=tied)
    ids = torch.randint(3, 60, (2, 7))
    before = whole(input_ids=ids).logits
    student = LlamaAdapter(first_layers(whole, 2), AdapterConfig(adapter_dim=4, modules_to_save=modules))
    at_start = student(input_ids=ids).logits
    with torch.no_grad():
        for p in student.adapter_parameters():
            p.add_(0.5)
    assert torch.equal(whole(input_ids=ids).logits, before)
    assert not torch.equal(student(input_ids=ids).logits, at_start)
    assert {p.data_ptr() for p in student.base.parameters()} < {p.data_ptr() for p in whole.parameters()}


# Training


def test_a_student_comes_closer_to_its_teacher() -> None:
    whole = tiny_run.model().unload()
    student = LlamaAdapter(first_layers(whole, 2), AdapterConfig(adapter_dim=16))
    texts = [{"text": row["text"]} for row in tiny_run.rows(64)]
    task = Distillation(student, whole, weight=1, temperature=1.5)
    config = tiny_run.quiet(**LM, epochs=6, batch_size=16, lr=2e-2)
    before = evaluate(student, TEXTS, config, tokenizer=TOKENIZER, task=task)
    result = train(student, texts, config, tokenizer=TOKENIZER, eval_data=TEXTS, task=task)
    after = result.metrics
    assert after is not None
    assert after["divergence"] < 0.7 * before["divergence"]
    assert after["agreement"] > before["agreement"]
    assert after["teacher_perplexity"] == pytest.approx(before["teacher_perplexity"], rel=1e-6)
    assert after["loss"] == pytest.approx(1.5**2 * after["divergence"], rel=1e-5)
    assert after["perplexity"] == pytest.approx(math.exp(after["cross_entropy"]))


def test_without_weight_it_is_plain_training() -> None:
    """λ = 0 is the language model's own loss: the same run to rounding, also with chunks and the prefix cache."""

    def losses(distil: bool) -> list[float]:
        model = tiny_run.model()
        task = Distillation(model, weight=0, chunk_tokens=3) if distil else None
        config = tiny_run.quiet(**LM)
        result = train(model, TEXTS, config, tokenizer=TOKENIZER, eval_data=TEXTS, task=task)
        assert result.prefix_layers == 3
        return [record["loss"] for record in result.history]

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)


TASKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "causal-lm": ([{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 40}"} for i in range(12)], {"task": "causal-lm"}),
    "classification": (tiny_run.rows(12, seed=1), {"task": "classification"}),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", list(TASKS))
def test_a_kept_text_weighs_as_one_target(kind: str, side: str) -> None:
    """A mixed batch against its parts: the task's rows alone, and each kept text alone, from whole logits."""
    rows, values = TASKS[kind]
    config = tiny_run.quiet(**values, padding_side=side)
    model = tiny_run.model(init="xavier")
    task = KeepBehaviour(model, temperature=2.0, weight=0.3, divergence="js", chunk_tokens=7)
    examples = task.load(WithKept(rows[:4], TEXTS[:2]), config, TOKENIZER)
    feed = Feed(task, config, None)
    order = [4, 0, 1, 5, 2, 3]
    loss, _ = task(feed([examples[i] for i in order]))
    alone, _ = task(feed(examples[:4]))
    expected = alone.double()
    for example in examples[4:]:
        ids = torch.from_numpy(example.input_ids)[None]
        z = model(input_ids=ids).logits[0, :-1].double()
        with model.disable_adapter(), torch.no_grad():
            t = model(input_ids=ids).logits[0, :-1].double()
        expected = expected + 0.3 * 2.0**2 * plain(z, t, 2.0, "js").mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(task.trained(config).values())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    only_kept, _ = task(feed(examples[4:]))
    assert only_kept.item() == pytest.approx((expected - alone).item(), rel=1e-5)
    assert sum(len(e.targets) for e in examples[4:]) == 2
    assert [isinstance(e, KeptText) for e in examples] == [False] * 4 + [True] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(TASKS))
def test_keeping_lowers_the_drift_and_the_task_is_still_learned(kind: str) -> None:
    rows, values = TASKS[kind]
    if kind == "classification":
        rows = tiny_run.rows(24)
    kept = [{"text": row["text"]} for row in tiny_run.rows(24, seed=9)]
    config = tiny_run.quiet(**values, epochs=30, lr=3e-2)

    def outcome(weight: float) -> dict[str, float]:
        model = tiny_run.model(layers=(2, 3))
        task = KeepBehaviour(model, weight=weight)
        data, unseen = (rows if weight == 0 else WithKept(rows, kept)), WithKept(rows, TEXTS)
        result = train(model, data, config, tokenizer=TOKENIZER, eval_data=unseen, task=task)
        assert result.metrics is not None
        return result.metrics

    free, held = outcome(0.0), outcome(0.5)
    assert held["kept_divergence"] < 0.5 * free["kept_divergence"]
    assert held["kept_agreement"] > free["kept_agreement"]
    assert held["accuracy"] >= 0.9
    assert held["targets"] == free["targets"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distillation", "keeping"])
def test_a_run_resumes_to_its_own_numbers_and_not_to_other_settings(kind: str, tmp_path: Path) -> None:
    def run(folder: Path, resume: bool = False, **settings: Any) -> list[Tensor]:
        model = tiny_run.model()
        values = {"epochs": 4, "checkpoint_every": 1, "keep_checkpoints": 100}
        config = tiny_run.quiet(**LM, **values, output_dir=folder, resume=resume)
        kinds = {"distillation": Distillation, "keeping": KeepBehaviour}
        task: Any = kinds[kind](model, **({"temperature": 2.0} | settings))
        data: Any = TEXTS if kind == "distillation" else WithKept(TASKS["causal-lm"][0], TEXTS)
        train(model, data, config, tokenizer=TOKENIZER, eval_data=data, task=task)
        return tiny_run.weights(model)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = run(tmp_path / "run")
        newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
        for checkpoint in newest[5:]:
            checkpoint.rename(tmp_path / checkpoint.name)
        with pytest.raises(CheckpointError, match=r"the run was begun with temperature=2\.0, not 3\.0: resume with"):
            run(tmp_path / "run", resume=True, temperature=3.0)
        with pytest.raises(CheckpointError, match=r"the run was begun with teacher=None, not '.*, 4 layers'"):
            run(tmp_path / "run", resume=True, teacher=same_shape(tiny_run.model(), seed=1))
        assert tiny_run.same_bits(run(tmp_path / "run", resume=True), expected)
    finally:
        torch.set_num_threads(threads)
    saved = json.loads((tmp_path / "run" / DISTILLATION_CONFIG).read_text())
    assert saved == {"teacher": None, "temperature": 2.0, "weight": 0.5, "divergence": "kl"}


def test_another_kind_of_run_is_not_resumed(tmp_path: Path) -> None:
    """Neither a plain one as a distillation, nor the reverse."""
    model = tiny_run.model()
    config = tiny_run.quiet(**LM, max_steps=1, output_dir=tmp_path / "plain")
    train(model, TEXTS, config, tokenizer=TOKENIZER)
    resumed = dataclasses.replace(config, resume=True)
    with pytest.raises(CheckpointError, match="begun with another task: Task, not Distillation"):
        train(model, TEXTS, resumed, tokenizer=TOKENIZER, task=Distillation(model))
    train(model, TEXTS, dataclasses.replace(config, output_dir=tmp_path), tokenizer=TOKENIZER, task=Distillation(model))
    with pytest.raises(CheckpointError, match="begun with another task: Distillation, not Task"):
        train(model, TEXTS, dataclasses.replace(resumed, output_dir=tmp_path), tokenizer=TOKENIZER)


# Files


@pytest.mark.parametrize("kind", [*TASKS, "distillation"])
def test_a_saved_run_is_evaluated_as_it_was(kind: str, tmp_path: Path) -> None:
    """With its own settings, and the model with its adapters off as the teacher."""
    model = tiny_run.model()
    if kind == "distillation":
        task: Task[Any] = Distillation(model, temperature=2.0, weight=0.3, divergence="js")
        data: Any = TEXTS
        values: dict[str, Any] = LM
    else:
        task = KeepBehaviour(model, temperature=2.0, weight=0.3, divergence="jsd", beta=0.2, top_k=5)
        rows, values = TASKS[kind]
        data = WithKept(rows, TEXTS)
    config = tiny_run.quiet(**values, output_dir=tmp_path)
    result = train(model, data, config, tokenizer=TOKENIZER, eval_data=data, task=task)
    newest = result.checkpoint
    assert newest is not None
    for folder in (tmp_path, newest):
        again, saved_config = type(task).from_pretrained(tiny_run.model().unload(), folder)
        assert type(again) is type(task)
        assert again.settings == task.settings
        assert saved_config == dataclasses.replace(with_rates(config, 32), output_dir=None)
        metrics = evaluate(again.model, data, saved_config, tokenizer=TOKENIZER, task=again)
        assert result.metrics is not None
        timeless = {key: value for key, value in result.metrics.items() if "second" not in key}
        assert {key: metrics[key] for key in timeless} == pytest.approx(timeless, rel=1e-5)


def test_a_saved_run_with_another_teacher_needs_it_again(tmp_path: Path) -> None:
    """Its scores against the wrong one would be wrong; without any it is a plain task."""
    model, teacher = tiny_run.model(), same_shape(tiny_run.model(), seed=5, num_hidden_layers=2)
    config = tiny_run.quiet(**LM, output_dir=tmp_path)
    task = Distillation(model, teacher)
    trained = train(model, TEXTS, config, tokenizer=TOKENIZER, eval_data=TEXTS, task=task).metrics
    assert trained is not None
    with pytest.raises(ValueError, match=r"teacher: expected the run's, .*, 2 layers, got None"):
        Distillation.from_pretrained(tiny_run.model().unload(), tmp_path)
    again, config = Distillation.from_pretrained(tiny_run.model().unload(), tmp_path, teacher=teacher)
    assert again.teacher is teacher
    metrics = evaluate(again.model, TEXTS, config, tokenizer=TOKENIZER, task=again)
    assert metrics["divergence"] == pytest.approx(trained["divergence"], rel=1e-5)
    plain_task: Task[Any]
    plain_task, config = Task.from_pretrained(tiny_run.model().unload(), tmp_path)
    metrics = evaluate(plain_task.model, TEXTS, config, tokenizer=TOKENIZER, task=plain_task)
    assert metrics["perplexity"] == pytest.approx(trained["perplexity"], rel=1e-5)

    Distillation(model).save(tmp_path, config)
    with pytest.raises(ValueError, match="teacher: expected None, the model itself as in the run, got Llama"):
        Distillation.from_pretrained(tiny_run.model().unload(), tmp_path, teacher=teacher)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": 3}, "field 'teacher': expected a string or null, got 3"),
        ({"weight": 2.0}, r"weight: expected a number in \[0, 1\], got 2\.0"),
        ({"temperature": "hot"}, r"temperature: expected a number in \(0, inf\), got 'hot'"),
        ({"divergence": None}, "divergence: expected one of kl, reverse-kl, js, jsd, got None"),
        (None, "field 'divergence' is missing"),
    ],
)
def test_damaged_settings(change: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    Distillation(tiny_run.model()).save(tmp_path, tiny_run.quiet(**LM))
    path = tmp_path / DISTILLATION_CONFIG
    saved = json.loads(path.read_text())
    if change is None:
        del saved["divergence"]
    path.write_text(json.dumps(saved | (change or {})))
    with pytest.raises(ValueError, match=f"distillation.json: {message}"):
        Distillation.from_pretrained(tiny_run.model().unload(), tmp_path)


def test_distillation_is_for_tokens() -> None:
    with pytest.raises(ValueError, match="task: expected causal-lm for Distillation"):
        Distillation(tiny_run.model()).load(tiny_run.rows(4), TrainConfig(), TOKENIZER)
