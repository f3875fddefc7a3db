"""Adapters, LoRA and fine-tuning at equal parameters: ``python -m experiments.quality run|cost|report``.

``sets`` are the texts, ``stream`` the backbone and its cached activations, ``methods`` what is trained, ``training``
one run, ``plan`` which runs follow from those that are done, ``rows`` the CSV, ``statistics`` the intervals, ``report``
tables and plots. All are described in docs/compared.md.
"""
