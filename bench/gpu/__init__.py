"""A GPU for a few minutes: what is prepared without it, and two calls that measure on it and lose nothing.

`prepare` fills a folder with what a bare machine lacks; `first` and `second` run their steps, each a process with a
limit of its own, and write one archive of results after every step.
"""
