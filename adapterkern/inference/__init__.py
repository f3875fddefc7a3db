"""What a trained adapter is for: a saved run in one call, predictions, reports, generated text.

runs.py         what kind of run a folder holds, and its backbone, adapters, head and tokenizer
api.py          load(), predict(): the entry points
classifier.py   a classification run as a model of transformers
generate.py     prompts to completions, in batches or streamed
settings.py     how: transformers' GenerationConfig
chat.py         a conversation in a terminal
reports.py      the report on an evaluation, by the kind of the head:
report.py       what a classification gets wrong: per label, the confusion matrix, the worst rows
label_report.py what a head for lists of labels gets wrong; number_report.py: how far a regression is off
table.py        predictions beside the columns of their rows, in a file
server/         the adapters of several runs behind an HTTP server
"""
