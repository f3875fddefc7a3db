"""What is said of an option that a command does not have: other libraries' names, beginnings and typing errors."""

import re

import pytest

from adapterkern import cli
from adapterkern.cli.options import UsageError
from adapterkern.model import config
from adapterkern.training import config as training

TRAIN = ("train", "--model", "m", "--train", "t", "--output", "o")
EVAL = ("eval", "run")
COMMANDS: list[tuple[str, ...]] = [
    TRAIN,
    EVAL,
    ("distill", *TRAIN[1:]),
    ("qa", *TRAIN),
    ("route", *TRAIN),
    ("multitask", *TRAIN[:3][1:], "--output", "o", "--data", "a", "f"),
    ("demo",),
    ("ablate",),
    ("budget", "--model-config", "m", "--max-params", "8e6"),
    ("doctor",),
]


def hint(command: tuple[str, ...], option: str) -> str:
    """What the message says after the option, before it names the help."""
    with pytest.raises(UsageError) as caught:
        cli._parser(command).read([*command, option, "3"])
    found = re.fullmatch(rf".*?: unknown {option}(.*); see adapterkern .*--help", str(caught.value))
    assert found is not None, caught.value
    return found[1]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        # what others call it, in the words of the command line
        ("--fp16", " (did you mean --precision fp16?)"),
        ("--bf16", " (did you mean --precision bf16?)"),
        ("--learning-rate", " (did you mean --lr?)"),
        ("--lora-r", " (did you mean --adapter-dim?)"),
        ("--betas", " (did you mean --beta1 and --beta2?)"),
        ("--target-modules", " (did you mean --position and --layers?)"),
        ("--leave-out", " (did you mean --layers, which names the rest?)"),
        ("--reduction-factor", " (did you mean --adapter-dim, which is hidden_size / reduction_factor?)"),
        ("--disable-tqdm", " (did you mean --no-progress?)"),
        ("--use-liger-kernel", " (did you mean --liger?)"),
        ("--task-type", " (did you mean --task?)"),
        ("--lora-alpha", " (did you mean --scale, which is lora_alpha / r?)"),
        ("--bias", " (did you mean --bias-scale?)"),
        ("--gradient-checkpointing", " (did you mean --checkpoint-activations?)"),
        ("--activation-offloading", " (did you mean --offload-activations?)"),
        ("--attn-implementation", " (did you mean --attn?)"),
        ("--load-in-4bit", " (did you mean --load-in 4bit?)"),
        # the field's name, where the option has another
        ("--num-layers", " (did you mean --backbone-layers?)"),
        ("--output-dir", " (did you mean --output?)"),
        ("--lr-scheduler", " (did you mean --schedule?)"),
        ("--clip-norm", " (did you mean --max-norm?)"),
        ("--no-fused", " (did you mean --unfused?)"),
        ("--no-liger", " (did you mean --liger?)"),
        # beginnings, ends, longer forms, typing errors
        ("--lr-decay", " (did you mean --weight-decay?)"),
        ("--eval-interval", " (did you mean --eval-every?)"),
        ("--train-epochs", " (did you mean --epochs?)"),
        ("--model-layers", " (did you mean --layers?)"),
        ("--ep", " (did you mean --epochs or --eps?)"),
        ("--ov", " (did you mean --overwrite?)"),
        ("--max_len", " (did you mean --max-length?)"),
        ("-epochs", " (did you mean --epochs?)"),
        ("--log", " (did you mean --log-every or --log-with?)"),
        ("--no-pl", " (did you mean --no-plot?)"),
        ("--e", ""),  # which may be seven
        ("--decay", " (did you mean --weight-decay?)"),
        ("--train-data", " (did you mean --train?)"),
        ("--model-name-or-path", " (did you mean --model?)"),
        ("--modle", " (did you mean --model?)"),
        ("--zzz", ""),
    ],
)
def test_train(option: str, said: str) -> None:
    assert hint(TRAIN, option) == said


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--fp16", ""),
        ("--learning-rate", ""),
        ("--per-device-train-batch-size", " (did you mean --eval-batch-size?)"),
        ("--use-liger-kernel", " (did you mean --liger?)"),
    ],
)
def test_eval_names_no_option_of_training(option: str, said: str) -> None:
    assert hint(EVAL, option) == said


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_what_others_call_it_is_said_in_options_that_there_are(command: tuple[str, ...]) -> None:
    for name in config.OTHER_NAMES | training.OTHER_NAMES:
        parser = cli._parser(command).read(command).parser
        known = {string for action in parser._actions for string in action.option_strings}
        if (option := f"--{name.replace('_', '-')}") in known:
            continue
        said = hint(command, option)
        if "did you mean" in said:
            assert set(re.findall(r"--[\w-]+", said)) <= known
            assert re.match(r" \(did you mean --", said)
            assert not re.search(r"[=\"']", said)
        else:
            assert re.fullmatch(r"|: adapters have no \w+|: there is no such option; in Python it is \S+", said)


def test_a_value_may_be_short_for_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--task", "lm"]) == 2
    tasks = "classification, multi-label, regression, causal-lm"
    assert f"--task: expected one of {tasks}, got 'lm' (did you mean causal-lm?);" in capsys.readouterr().err
