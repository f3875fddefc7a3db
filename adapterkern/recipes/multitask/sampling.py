"""The order of rows in an epoch of several tasks.

Each task's rows come in the order in which that task would see them alone, pass after pass, and an epoch has as many
places as there are rows. With temperature T, task t has a share of n_t^(1/T) / Σ n^(1/T) of them: T = 1 shows every row
once per epoch, T = ∞ shows all tasks equally, the rows of small ones several times. Every step, and not only the
epoch, has each task's share, as closely as whole rows allow: the task's j-th of c_t rows in the epoch is placed at the
fraction (j + ½) / c_t of it.
"""

import math
from collections.abc import Sequence

from adapterkern.training.data.batches import epoch_order


def shares(rows: Sequence[int], temperature: float) -> list[int]:
    """How many of an epoch's Σ ``rows`` places each task has: in proportion to n^(1/T), and at least one.

    The largest remainders are rounded up; a task without rows has none.
    """
    total = sum(rows)
    weights = [n ** (1 / temperature) if n else 0.0 for n in rows]
    exact = [total * w / sum(weights) for w in weights]
    counts = [max(math.floor(e), 1) if n else 0 for e, n in zip(exact, rows, strict=True)]
    # Where the minimum of one took too many places, `behind` is negative and the largest tasks give them back.
    by_remainder = sorted(range(len(rows)), key=lambda t: counts[t] - exact[t])
    behind = total - sum(counts)
    for t in by_remainder[: max(behind, 0)]:
        counts[t] += 1
    for _ in range(-behind):
        counts[max(range(len(rows)), key=lambda t: counts[t])] -= 1
    return counts


def mixed_order(rows: Sequence[Sequence[int]], temperature: float, seed: int, epoch: int) -> list[int]:
    """An epoch's order of the tasks' ``rows``, given by their indices. It depends on the arguments alone."""
    counts = shares([len(of_task) for of_task in rows], temperature)
    placed = []
    for of_task, count in zip(rows, counts, strict=True):
        start = epoch * count  # in the task's own sequence of passes
        for j in range(count):
            turn, place = divmod(start + j, len(of_task))
            if j == 0 or place == 0:
                own = epoch_order(len(of_task), seed, turn)
            placed.append(((j + 0.5) / count, of_task[own[place]]))
    return [index for _, index in sorted(placed, key=lambda item: item[0])]
