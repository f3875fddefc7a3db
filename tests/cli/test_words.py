"""Messages about Python's arguments, in the words of the command line."""

import pytest

from adapterkern import cli
from adapterkern.cli import words


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("seed: expected x", "--seed: expected x"),
        ("config: pooling='last' has no effect", "config: --pooling last has no effect"),  # and no file of --config
        ("num_layers: got 3", "--backbone-layers: got 3"),
        ("run/step-1: begun with lr=0.001, not 0.01", "run/step-1: begun with --lr 0.001, not 0.01"),
        ("a: begun with task='causal-lm', not 'x'", "a: begun with --task causal-lm, not x"),
        ("a: begun with train_adapters=True, not False", "a: begun with --train-adapters, not --no-train-adapters"),
        ("a: with init='xavier' in trained adapter 1, not 'x'", "a: with --init xavier in trained adapter 1, not x"),
        (
            "the run was begun with another task: RoutedTask, not Task: resume",
            "the run was begun with another task: one of `adapterkern route train`, not one of `adapterkern train`: "
            "resume",
        ),
        ("another task: Mine, not Task", "another task: Mine, not one of `adapterkern train`"),
        ("set skip_bad_rows to skip them", "set --skip-bad-rows to skip them"),
        ("or set prefix_cache=False", "or set --no-prefix-cache"),
        ("plot: expected True, got False", "--plot: expected --plot, got --no-plot"),
        ("layers: expected None, got (0, 1)", "--layers: expected none, got 0,1"),
        ("run/step-1: begun with layers=[2, 3], not [0]", "run/step-1: begun with --layers 2,3, not 0"),
        ("a: begun with modules_to_save=['norm'], not None", "a: begun with --modules-to-save norm, not none"),
        ("its results differ (in Python: f(strict=True) refuses this)", "its results differ"),
        # not the names of fields
        ("/data/max_length.csv: no file", "/data/max_length.csv: no file"),
        ("the task of a seed", "the task of a seed"),
        ("task.json: lr: expected x", "task.json: lr: expected x"),
        ("expected one of adapter_dim, max_length", "expected one of adapter_dim, max_length"),
    ],
)
def test_fields_are_named_as_options(message: str, shown: str) -> None:
    argv = ["train", "--model", "m", "--train", "t", "--output", "o"]
    assert words.in_options(message, cli._parser(argv).read(argv).parser) == shown
