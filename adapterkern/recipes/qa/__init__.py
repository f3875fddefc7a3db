"""Extractive question answering: the answer is a span of the context, or there is none.

settings.py    how contexts are cut and answers chosen
squad.py       rows and SQuAD files → questions; exact match and F1
spans.py       questions → windows of tokens; spans of tokens → answers
head.py        start and end scores of tokens
task.py        ``QuestionAnswering``, the task
"""

from typing import TYPE_CHECKING

from adapterkern import _lazy

if TYPE_CHECKING:
    from adapterkern.recipes.qa.settings import SpanSettings as SpanSettings
    from adapterkern.recipes.qa.task import QuestionAnswering as QuestionAnswering

# Imported on first use: the command line makes options from settings.py, and task.py takes seconds to import.
_HOMES = {"QuestionAnswering": "task", "SpanSettings": "settings"}
__all__ = list(_HOMES)
__getattr__, __dir__ = _lazy.attach(__name__, _HOMES)
