"""Measuring in a few minutes on a GPU: one command that prepares without it, and two that run on it.

``prepare`` fills a folder with what a bare machine lacks. ``first`` and ``second`` run their steps, each a process with
its own time limit, and write one archive of results after every step.
"""
