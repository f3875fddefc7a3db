"""Adapters, LoRA and fine-tuning at equal parameters: ``python -m experiments.quality all|run|left|costs|report``.

``sets`` are the texts, ``stream`` the backbone and its cached activations, ``methods`` what is trained, ``training``
one run, ``plan`` which runs follow from those that are done, ``rows`` the CSV, ``statistics`` the intervals, ``report``
the tables, ``pictures`` the plots, ``costs`` what a step takes.
"""
