"""Ablations: many short runs that differ in a few fields, compared over seeds.

study.py        ``Study``: what to vary; ``parse_axis``, ``parse_setting``: the same from strings
kinds.py        ``KINDS``: the kinds of adapter by name
presets.py      ``PRESETS``: the studies of ``adapterkern ablate``
runs.py         ``run_study``: runs them, one row of ``ablation.csv`` per run
report.py       ``write_report``: means, deviations and gains over the base point, as tables and a plot
stability.py    ``write_stability``: spikes of loss and gradient norm, as a table and a plot
"""
