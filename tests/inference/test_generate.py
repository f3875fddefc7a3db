"""Prompts to completions: as in training, in batches as alone, with the adapter that is asked for."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import adapterkern as ak
from adapterkern.inference import generate
from adapterkern.inference.generate import answering, check_prompts, complete, completions, encode
from adapterkern.inference.runs import find_run
from adapterkern.inference.settings import GenerationSettings, read_generation
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.recipes.routing.router import RoutingConfig
from adapterkern.recipes.routing.task import RoutedTask
from adapterkern.training import load_examples
from adapterkern.training.data.chat import question
from adapterkern.training.data.ends import turn_end
from adapterkern.training.data.rows import DataError
from tests.support import tiny_chat, tiny_run
from tests.support.tiny_chat import BARE, CHATML, PLAIN, said
from tests.support.tiny_llama import draw

PROMPTS = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15", "w2 w3", "w20 w21 w22"]
TEN = GenerationSettings(max_new_tokens=10)


def model(seed: int = 0) -> LlamaAdapter:
    made = tiny_run.model(seed)
    draw(made)
    return made.eval()


def alone(adapted: LlamaAdapter, prompt: str, **settings: Any) -> str:
    """What transformers gives one prompt."""
    tokenizer = tiny_run.tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    found = adapted.generate(**inputs, **{"max_new_tokens": 10, "do_sample": False, "pad_token_id": 2} | settings)
    return str(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize(
    "settings",
    [{}, {"repetition_penalty": 1.7}, {"num_beams": 3}, {"no_repeat_ngram_size": 2}, {"num_beams": 2, "min_length": 9}],
    ids=str,
)
def test_a_batch_gives_what_each_prompt_gets_alone(settings: dict[str, Any], batch_size: int) -> None:
    adapted = model()
    other = {key: settings[key] for key in settings.keys() & {"no_repeat_ngram_size", "min_length"}}
    own = {key: value for key, value in settings.items() if key not in other}
    asked = GenerationSettings(max_new_tokens=10, **own, other=other)
    expected = [alone(adapted, prompt, **settings) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert complete(adapted, tiny_run.tokenizer(), PROMPTS, asked, batch_size=batch_size) == expected


def test_the_model_s_configuration_is_left_as_it_was() -> None:
    adapted = model()
    before = adapted.generation_config
    complete(adapted, tiny_run.tokenizer(), ["w5"], TEN)
    assert adapted.generation_config is before
    assert before.max_new_tokens is None


def test_nothing_is_drawn_unless_a_temperature_asks_for_it() -> None:
    """Whatever the model's own configuration says, which holds for all else."""
    adapted, tokenizer = model(), tiny_run.tokenizer()
    greedy = complete(adapted, tokenizer, PROMPTS, TEN)
    config = adapted.generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k = True, 5.0, 0.99, 90
    assert complete(adapted, tokenizer, PROMPTS, TEN) == greedy
    assert complete(adapted, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=10, temperature=0.0)) == greedy
    hot = GenerationSettings(max_new_tokens=10, temperature=3.0)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(complete(adapted, tokenizer, PROMPTS, hot))
    assert drawn[0] == drawn[1]
    assert drawn[0] not in (drawn[2], greedy)
    assert hot.config(adapted, tokenizer).top_k == 90
    config.repetition_penalty = 1.7
    assert complete(adapted, tokenizer, PROMPTS, TEN)[0] == alone(adapted, PROMPTS[0], repetition_penalty=1.7)


def test_transformers_has_nothing_to_warn_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    adapted = model()
    adapted.generation_config.temperature, adapted.generation_config.max_length = 0.6, 40
    for asked in (TEN, GenerationSettings(temperature=0.5, top_p=0.9, max_new_tokens=4)):
        complete(adapted, tiny_run.tokenizer(), PROMPTS, asked, batch_size=2)
    assert not caplog.records


# What a prompt is


@pytest.mark.parametrize("end", ["", " </s>"])
def test_a_text_is_tokenized_as_in_training(end: str) -> None:
    """The BOS is there once, also where the text begins with it; what ends a text is not."""
    tokenizer = tiny_run.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"<s> $A{end}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for prompt in ("w5 w6", "<s> w5 w6"):
        ((example,), _) = load_examples([{"prompt": prompt, "completion": " w7"}], tiny_chat.CONFIG, tokenizer)
        assert encode(tokenizer, prompt) == example.input_ids[: example.positions[0] + 1].tolist() == [1, 8, 9]


@pytest.mark.parametrize("template", [CHATML, BARE, PLAIN])
def test_messages_are_rendered_as_in_training(template: str) -> None:
    tokenizer = tiny_chat.tokenizer(template)
    messages = said("w5 w6", "w7", "w8", "w9")
    example = tiny_chat.load({"messages": messages}, template)
    asked = question([*messages[:3]])
    ids = encode(tokenizer, asked)
    learned = example.input_ids.tolist()
    assert ids == learned[: len(ids)]
    last_turn = [p for p in example.positions.tolist() if p + 1 >= len(ids)]
    assert last_turn[0] + 1 == len(ids)  # the answer begins where the prompt ends
    assert encode(tokenizer, question(messages)) == ids  # whose last answer is not shown
    assert encode(tokenizer, "w5 w6", chat=True) == encode(tokenizer, question(messages[:1]))


def test_what_ends_a_turn() -> None:
    assert turn_end(tiny_chat.tokenizer(CHATML)) == tiny_chat.tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert turn_end(tiny_chat.tokenizer(BARE)) == 2
    assert turn_end(tiny_chat.tokenizer(PLAIN)) is None
    config = TEN.config(model(), tiny_run.tokenizer(), [7])
    assert config.eos_token_id == [2, 7]
    assert config.pad_token_id == 2


def test_a_completion_stops_at_its_end_and_goes_no_further() -> None:
    """In a batch the shorter one is padded behind its end, here with a token that is no special one."""
    adapted, tokenizer = model(), tiny_run.tokenizer()
    whole = [complete(adapted, tokenizer, [prompt], TEN)[0].split() for prompt in PROMPTS]
    end = tokenizer.convert_tokens_to_ids(whole[0][2])
    asked = GenerationSettings(max_new_tokens=10, other={"eos_token_id": end, "pad_token_id": 50})
    found = complete(adapted, tokenizer, PROMPTS, asked)
    assert found[0].split() == whole[0][: whole[0].index(whole[0][2]) + 1]
    assert [one.split() for one in found] == [
        text[: text.index(whole[0][2]) + 1] if whole[0][2] in text else text for text in whole
    ]


def test_the_model_s_length(caplog: pytest.LogCaptureFixture) -> None:
    """64 tokens: what leaves less room runs alone, and does not cut the others."""
    adapted, tokenizer = model(), tiny_run.tokenizer()
    long = " ".join(f"w{i}" for i in range(60))
    found = complete(adapted, tokenizer, [long, *PROMPTS], TEN)
    assert "1 of 6 prompts leave room for fewer than 10 new tokens in the 64 that the model was made for" in caplog.text
    assert found[0] == alone(adapted, long, max_new_tokens=4)
    assert found[1:] == [alone(adapted, prompt) for prompt in PROMPTS]
    with pytest.raises(ValueError, match=r"^prompts\[1\]: expected a prompt of fewer than the model's 64 tokens, got"):
        complete(adapted, tokenizer, ["w5", f"{long} {long}"])
    with pytest.raises(ValueError, match=r"^prompts\[0\]: expected a prompt with tokens, got none"):
        complete(adapted, tokenizer, [""])


# Which adapter


def test_the_adapter_that_is_asked_for() -> None:
    adapted, tokenizer = model(), tiny_run.tokenizer()
    adapted.add_adapter("other", ak.AdapterConfig(adapter_dim=4, layers=[1]))
    draw(adapted, "other")
    expected = {}
    for name in ("default", "other"):
        adapted.set_adapter(name)
        expected[name] = alone(adapted, PROMPTS[2])
    with adapted.disable_adapter():
        expected["none"] = alone(adapted, PROMPTS[2])
    assert len(set(expected.values())) == 3
    for name, text in expected.items():
        assert complete(adapted, tokenizer, [PROMPTS[2]], TEN, adapter=name) == [text]
        assert adapted.active_adapter == "other"
    assert complete(adapted, tokenizer, [PROMPTS[2]], TEN) == [expected["other"]]
    with pytest.raises(ValueError, match=r"^adapter: expected one of default, other, none, got 'third'"):
        complete(adapted, tokenizer, PROMPTS, adapter="third")


def test_several_tasks_and_routed_experts() -> None:
    adapted, tokenizer = model(), tiny_run.tokenizer()
    adapted.add_adapter("b", ak.AdapterConfig(adapter_dim=4, layers=[1]))
    draw(adapted, "b")
    several = MultiTask(adapted, ["default", "b"])
    adapted.set_adapter("b")
    expected = alone(adapted, PROMPTS[0])
    adapted.set_adapter("default")
    assert complete(several, tokenizer, PROMPTS, TEN, adapter="b")[0] == expected
    with pytest.raises(ValueError, match=r"^adapter: expected one of default, b, none, got no name"):
        complete(several, tokenizer, PROMPTS, TEN)
    routed = RoutedTask(model(), RoutingConfig(experts=2)).eval()
    draw(routed.model, "expert-1")
    texts = complete(routed, tokenizer, PROMPTS, TEN)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    found = routed.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=2)
    assert texts[0] == tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with answering(routed, "none"):
        assert routed.model.active_adapter is None


# Rows


def test_rows_of_every_shape() -> None:
    adapted, tokenizer = model(), tiny_chat.tokenizer()
    shapes: list[tuple[dict[str, Any], Any]] = [
        ({"prompt": "w5 w6", "n": 1}, "w5 w6"),
        ({"messages": said("w5", "w6", "w7")}, question(said("w5", "w6", "w7"))),
        ({"messages": [*said("w5"), {"role": "assistant", "content": "w6", "weight": 0}]}, question(said("w5"))),
        ({"prompt": said("w5")}, question(said("w5"))),
        ({"conversations": [{"from": "human", "value": "w5"}]}, question(said("w5"))),
        ({"instruction": "w5", "input": "w6"}, question(said("w5\n\nw6"))),
    ]
    for row, prompt in shapes:
        ((read, found),) = completions(adapted, tokenizer, [row], tiny_chat.CONFIG, TEN)
        assert read.values == row
        assert found is not None
        templated = not isinstance(prompt, str)
        assert [found.text] == generate.continued(adapted, tokenizer, [encode(tokenizer, prompt)], TEN, chat=templated)
        assert found.columns() == {"completion": found.text}


def test_rows_are_answered_in_their_order_and_bad_ones_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapted, tokenizer = model(), tiny_run.tokenizer()
    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in PROMPTS] + [{"prompt": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_run.quiet(task="causal-lm")
    with pytest.raises(DataError, match=r"rows.jsonl:6: column 'prompt': expected a non-empty string, got a number"):
        check_prompts(path, config)
    config = tiny_run.quiet(task="causal-lm", skip_bad_rows=True)
    assert check_prompts(path, config) == 6
    found = [answer for _, answer in completions(adapted, tokenizer, path, config, TEN, batch_size=2)]
    assert [answer and answer.text for answer in found] == [*(alone(adapted, prompt) for prompt in PROMPTS), None]
    assert "skipped 1 bad row" in caplog.text


def test_columns_that_do_not_fit() -> None:
    config = tiny_run.quiet(task="causal-lm")
    with pytest.raises(DataError, match=r"column 'prompt' is missing; there are 'Prompt'.* Did you mean 'Prompt'"):
        check_prompts([{"Prompt": "w5"}], config)
    with pytest.raises(DataError, match="column 'completion': expected rows without the column that the completions"):
        check_prompts([{"prompt": "w5", "completion": "w6"}], config)
    assert check_prompts([{"prompt": "w5", "completion": "w6"}], config, "answer") == 1
    with pytest.raises(DataError, match="data: no rows"):
        check_prompts([], config)
    with pytest.raises(DataError, match="expected a message to answer, got 'assistant'"):
        check_prompts([{"messages": said("w5", "w6")[1:]}], config)


@pytest.mark.parametrize(("row", "chats"), [({"messages": said("w5", "w6")}, True), ({"text": "w5 w6"}, False)])
def test_a_run_says_whether_it_learned_messages(row: dict[str, Any], chats: bool, tmp_path: Path) -> None:
    config = tiny_run.quiet(task="causal-lm", max_steps=1, checkpoint_every=1, output_dir=tmp_path)
    ak.train(model(), [row] * 4, config, tokenizer=tiny_chat.tokenizer())
    for folder in (tmp_path, tmp_path / "checkpoints" / "step-00000001"):
        assert generate.learned_chats(find_run(folder)) is chats
    (tmp_path / "data_summary.json").unlink()
    assert generate.learned_chats(find_run(tmp_path)) is None


@pytest.mark.parametrize("name", ["tasks", "checkpoints"])
def test_a_users_folder_may_have_the_name_of_ours(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "answers"
    config = tiny_run.quiet(task="causal-lm", max_steps=1, output_dir=folder)
    ak.train(model(), [{"messages": said("w5", "w6")}] * 4, config, tokenizer=tiny_chat.tokenizer())
    assert generate.learned_chats(find_run(folder)) is True


def test_a_task_says_whether_it_learned_messages(tmp_path: Path) -> None:
    adapted = model()
    adapted.add_adapter("plain", adapted.adapter_config("default"))
    config = tiny_run.quiet(task="causal-lm", max_steps=1, checkpoint_every=1, output_dir=tmp_path)
    rows = {"default": [{"messages": said("w5", "w6")}] * 4, "plain": [{"text": "w5 w6"}] * 4}
    task = MultiTask(adapted, list(rows))
    ak.train(adapted, rows, config, tokenizer=tiny_chat.tokenizer(), task=task)
    newest = tmp_path / "checkpoints" / "step-00000001"
    for folder in (tmp_path, newest):
        assert [generate.learned_chats(find_run(folder), name) for name in (*rows, None)] == [True, False, True]
        assert [generate.learned_chats(find_run(folder / "tasks" / name)) for name in rows] == [True, False]


def test_two_threads_do_not_answer_with_each_others_adapter() -> None:
    adapted = model()

    class Waits:  # a streamer, within whose first call the other thread asks
        def __init__(self) -> None:
            self.found: list[str] = []

        def put(self, _: Any) -> None:
            if not self.found:
                with ThreadPoolExecutor(1) as other:
                    asked = other.submit(complete, adapted, tiny_run.tokenizer(), ["w5"], TEN, adapter="none")
                    self.found.append(str(asked.exception()))

        def end(self) -> None:
            pass

    streamer = Waits()
    assert complete(adapted, tiny_run.tokenizer(), ["w5"], TEN, streamer=streamer) == [alone(adapted, "w5")]
    assert streamer.found[0].startswith("model: expected one that no other thread trains or evaluates, got one in use")


# Settings


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        ({"top_p": 0.9}, {}, "^top_p: has no effect on the likeliest token: expected a temperature above 0, got none"),
        ({"top_k": 5, "temperature": 0.0}, {}, "^top_k: has no effect"),
        ({}, {"min_p": 0.1}, "^min_p: has no effect"),
        ({"temperature": -1.0}, {}, r"^temperature: expected a number in \[0, inf\), got -1.0"),
        ({"temperature": 0.7}, {"do_sample": False}, "^temperature: expected one that fits do_sample=False, got 0.7"),
        ({"max_new_tokens": 0}, {}, "^max_new_tokens: expected an integer >= 1, got 0"),
        ({"num_beams": 2}, {"num_beams": 3}, "^num_beams: expected it once"),
        ({}, {"temprature": 1}, r"got 'temprature' \(did you mean temperature\?\)"),
        ({}, {"num_return_sequences": 2}, "num_return_sequences: expected one completion for each prompt, got 2"),
        ({}, {"max_length": 20}, "max_length: expected max_new_tokens, got 20"),
        ({}, {"return_dict_in_generate": True}, "return_dict_in_generate: expected text"),
        ({}, {"length_penalty": 2.0}, "^generation: .*length_penalty.*only used in beam-based"),
    ],
)
def test_settings_that_do_not_fit(own: dict[str, Any], other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**own, other=other)


def test_a_saved_generation_config_is_taken_whole(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    saved = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5], "transformers_version": "5"}
    path.write_text(json.dumps(saved))
    config = GenerationSettings(other=read_generation(str(path))).config(model(), tiny_run.tokenizer())
    assert (config.do_sample, config.temperature, config.top_p, config.eos_token_id) == (True, 0.6, 0.9, [2, 5])
    assert config.max_new_tokens == 256
    read = read_generation
    assert read("stop_strings=END") == {"stop_strings": "END"}
    assert read("bad_words_ids=[[1]]") == {"bad_words_ids": [[1]]}
    assert read("early_stopping=True") == {"early_stopping": True}
    with pytest.raises(FileNotFoundError, match=r"^generation: expected KEY=VALUE or a .json file, got 'top'"):
        read("top")
