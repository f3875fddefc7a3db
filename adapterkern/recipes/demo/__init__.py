"""The demo, and the model and texts of the documentation's examples.

demo.py       ``run_demo``: a head alone against adapters, on a real LLaMA and real texts
corpora.py    ``obtain``, ``draw_texts``, ``column``: fetch the model and the texts, and draw samples
"""
