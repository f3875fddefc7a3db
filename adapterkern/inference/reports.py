"""The reports on an evaluation, by the kind of the head."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from adapterkern.inference.label_report import make_label_report
from adapterkern.inference.number_report import make_number_report
from adapterkern.inference.report import WORST, AnyReport, make_report
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.rows import BadRows, iter_rows, scalar
from adapterkern.training.data.split import HeldOut
from adapterkern.training.head_kinds import MultiLabelHead, RegressionHead
from adapterkern.training.task import Task


def reports(
    task: Task[Any], answers: Sequence[Any], data: Any, config: TrainConfig, tokenizer: Any, worst: int = WORST
) -> dict[str, AnyReport]:
    """The report on an evaluation, or one per task of several, by name; ``""`` if there is one alone.

    Args:
        task: that was evaluated, with heads for labeled texts.
        answers: what ``evaluate`` has kept.
        data, config, tokenizer: those of the evaluation; of data its wrong rows are read again, for their texts.
    """
    heads: dict[str, Any] = dict(task.heads.items()) if isinstance(task, MultiTask) else {"": task.head}
    found: dict[str, AnyReport] = {}
    for name, head in heads.items():
        number = task.names.index(name) if isinstance(task, MultiTask) else None
        mine = [one for one in answers if number is None or getattr(one.example, "task", None) == number]
        if not mine:
            continue
        mine.sort(key=lambda one: one.example.row)
        report = _report(head, mine, worst)
        texts = _texts(data[name] if name else data, {row.place for row in report.wrong}, config.text_column)
        given = [one.example for one in mine if one.example.given and one.example.place in texts]
        texts |= {example.place: tokenizer.decode(example.input_ids) for example in given}
        wrong = [dataclasses.replace(row, text=texts.get(row.place)) for row in report.wrong]
        found[name] = dataclasses.replace(report, wrong=wrong)
    return found


def _report(head: Any, answers: Sequence[Any], worst: int) -> Any:
    """The report without the texts."""
    places = [one.example.place for one in answers]
    if isinstance(head, MultiLabelHead | RegressionHead):
        make = make_label_report if isinstance(head, MultiLabelHead) else make_number_report
        targets, scores = (np.stack(of) for of in ([a.example.targets for a in answers], [a.scores for a in answers]))
        return make(head, targets, scores, places, worst)  # type: ignore[arg-type]
    columns = (
        [int(one.example.targets[0]) for one in answers],
        [one.label for one in answers],
        [one.probability for one in answers],
    )
    return make_report(head.labels, *columns, places, [None] * len(answers), worst)


def _texts(data: Any, places: Collection[str], column: str) -> dict[str, Any]:
    """The texts of the rows at these places; None of a row that is tokenized already."""
    if not places:
        return {}
    data = data.train_data if isinstance(data, HeldOut) else data  # of which a share has the places
    rows = iter_rows(data, BadRows(""))  # the evaluation has named the bad ones
    return {row.place: scalar(row.values.get(column)) for row in rows if row.place in places}
