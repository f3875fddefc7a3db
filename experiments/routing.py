"""Does a router help? ``python -m experiments.routing``: one label set over two corpora, with no corpus label.

Reuters R8 and 20 newsgroups in one file, 28 labels, on the first 8 layers of SmolLM2-135M. Four experts of dim 16 with
a router are compared with a single adapter of the same active size (16) and of the same total size (64); then the cost
of running any expert is varied. Accuracy, how the routes match the corpora, and what the skipped texts have in common
go to a JSON file and a plot. All runs share one backbone and one cache of its frozen prefix.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import adapterkern as ak
from adapterkern.cli.options import layer_list
from adapterkern.recipes.demo import corpora
from adapterkern.recipes.routing.router import RoutingConfig
from adapterkern.recipes.routing.task import RoutedTask
from adapterkern.training import PrefixCache
from adapterkern.training.data.examples import Example, numbered
from adapterkern.training.feed import Feed, eval_batches
from adapterkern.training.parallel.accelerator import make_accelerator
from adapterkern.training.task import Task
from experiments.common import Rows, backbone, make_parser, parse, record, show, texts

NUM_LAYERS, DIM, EXPERTS = 8, 16, 4
ORIGINS = ("R8", "newsgroups")
TRAINING: dict[str, Any] = {"epochs": 8, "batch_size": 16, "lr": 5e-3, "max_length": 48, "progress": False}


class Variant(NamedTuple):
    """A line of the comparison."""

    name: str
    adapter_dim: int  # 0: the head alone
    routing: RoutingConfig | None = None


HEAD = Variant("head alone", 0)
COMPARED = (
    HEAD,
    Variant("one adapter, dim 16", DIM),
    Variant("one adapter, dim 64", DIM * EXPERTS),
    Variant("4 x 16, probability", DIM, RoutingConfig(experts=EXPERTS, gate="probability")),
    Variant("4 x 16, integrated", DIM, RoutingConfig(experts=EXPERTS, gate="integrated")),
    Variant("4 x 16, up to two", DIM, RoutingConfig(experts=EXPERTS, gate="probability", top_k=2)),
)


def costly(name: str, gate: str, cost: float) -> Variant:
    """One that pays for running any expert, after three free epochs."""
    return Variant(name, DIM, RoutingConfig(experts=EXPERTS, gate=gate, cost=cost, free_epochs=3))


SWEEP = (
    *(costly("cost", "integrated", cost) for cost in (0.01, 0.03, 0.1, 0.3)),
    *(costly("cost, probability gate", "probability", cost) for cost in (0.001, 0.003, 0.01, 0.03)),
)


class Mixed(NamedTuple):
    """Texts with their labels, and the number of the corpus that each is from, which no run sees."""

    rows: Rows
    origin: list[int]


def mixture(tables: Sequence[corpora.Member], count: int, exclude: frozenset[str] = frozenset()) -> Mixed:
    """``count`` texts from each of the tables."""
    parts = [texts(table, count, exclude=exclude) for table in tables]
    return Mixed([row for part in parts for row in part], [number for number, part in enumerate(parts) for _ in part])


class Shared:
    """The backbone, the data and the cache that every run shares."""

    def __init__(self, train: int, test: int, sites: tuple[int, ...]) -> None:
        self.sites = sites
        self.llama, self.tokenizer = backbone(NUM_LAYERS)
        self.train = mixture((corpora.R8_TRAIN, corpora.NEWSGROUPS_TRAIN), train)
        known = frozenset(row["text"] for row in self.train.rows)
        self.test = mixture((corpora.R8_TEST, corpora.NEWSGROUPS_TEST), test, known)
        self.cache = PrefixCache()
        self.head_right: dict[int, list[bool]] = {}  # per seed: which test texts the head alone gets right

    def run(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Train one variant and describe its results on the test texts."""
        torch.manual_seed(seed)
        config = ak.TrainConfig(**TRAINING, seed=seed, train_adapters=variant.adapter_dim > 0, eval_every=10**6)
        model = ak.LlamaAdapter(self.llama, ak.AdapterConfig(adapter_dim=variant.adapter_dim or 1, layers=self.sites))
        task = Task(model) if variant.routing is None else RoutedTask(model, variant.routing)
        how: dict[str, Any] = {"tokenizer": self.tokenizer, "cache": self.cache, "task": task}
        result = ak.train(model, self.train.rows, config, **how)
        # Texts whose label only the test has count as wrong: no head knows it.
        assert task.head is not None
        known = [i for i, row in enumerate(self.test.rows) if row["label"] in task.head.labels]
        examples = numbered(task.load([self.test.rows[i] for i in known], config, self.tokenizer))
        with task.running(config), torch.no_grad():
            right, chosen = self._inspect(task.eval(), examples, config)
        model.unload()
        every = [False] * len(self.test.rows)
        for i, hit in zip(known, right, strict=True):
            every[i] = hit
        row: dict[str, Any] = {
            "variant": variant.name,
            "seed": seed,
            "trained_parameters": result.trainable_parameters,
            "train_loss": next(r["loss"] for r in reversed(result.history) if r["kind"] == "train"),
            "train_seconds": round(result.seconds, 1),
            "accuracy": statistics.mean(every),
        }
        for number, name in enumerate(ORIGINS):
            row[f"accuracy_{name}"] = statistics.mean(
                r for r, o in zip(every, self.test.origin, strict=True) if o == number
            )
        if variant == HEAD:
            self.head_right[seed] = every
        if variant.routing is not None:
            row |= self._describe_routes(chosen, [self.test.origin[i] for i in known], variant.routing, right)
            if seed in self.head_right:
                head = [self.head_right[seed][i] for i in known]
                skipped = [all(c < 0 for c in each) for each in chosen]
                for name, wanted in (("skipped", True), ("run", False)):
                    hits = [h for h, s in zip(head, skipped, strict=True) if s is wanted]
                    row[f"head_alone_accuracy_of_{name}"] = statistics.mean(hits) if hits else None
        return row

    def _inspect(
        self, task: Task, examples: list[Example], config: ak.TrainConfig
    ) -> tuple[list[bool], list[list[int]]]:
        """For each example, whether its label is right and which experts it ran."""
        feed = Feed(task, config, self.cache)
        autocast = make_accelerator(config.precision, task.model.device).autocast
        feed.add(examples, self.cache.fill(task.model, examples, config, autocast) or [])
        right, chosen = {}, {}
        for batch in eval_batches(examples, config):
            inputs = feed(batch)
            assert task.head is not None
            routes: list[list[int]] = [[]] * len(batch)
            if isinstance(task, RoutedTask):
                hidden, route = task.hidden_and_route(inputs)
                routes = route.chosen.tolist()
            else:
                hidden = task.hidden(inputs)
            hits = (task.head(hidden, inputs["attention_mask"]).argmax(1) == inputs["targets"]).tolist()
            for example, hit, experts in zip(batch, hits, routes, strict=True):
                right[example.row], chosen[example.row] = hit, experts
        return [right[e.row] for e in examples], [chosen[e.row] for e in examples]

    def _describe_routes(
        self, chosen: list[list[int]], origin: list[int], routing: RoutingConfig, right: list[bool]
    ) -> dict[str, Any]:
        first = [route[0] for route in chosen]  # the best expert, or none
        table = [[0] * len(ORIGINS) for _ in range(EXPERTS + 1)]
        for expert, o in zip(first, origin, strict=True):
            table[expert][o] += 1  # −1, none, is the last row
        return {
            "top_k": routing.top_k,
            "skip": routing.skip,
            "gate": routing.gate,
            "cost": routing.cost,
            "free_epochs": routing.free_epochs,
            "skipped": statistics.mean(all(c < 0 for c in each) for each in chosen),
            "experts_run": statistics.mean(sum(c >= 0 for c in each) for each in chosen),
            "texts_by_expert_and_corpus": table,
            "purity": sum(map(max, table)) / len(first),
            "nmi": normalized_mutual_information(table),
        }


def normalized_mutual_information(table: list[list[int]]) -> float:
    """Mutual information of rows and columns over the mean of their entropies; 0 where one of them is constant."""
    total = sum(map(sum, table))

    def entropy(counts: Sequence[int]) -> float:
        return -sum(c / total * math.log(c / total) for c in counts if c)

    by_row, by_column = entropy([*map(sum, table)]), entropy([*map(sum, zip(*table, strict=True))])
    joint = entropy([c for row in table for c in row])
    return 2 * (by_row + by_column - joint) / (by_row + by_column) if by_row and by_column else 0.0


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of each variant, where the texts are routed, and what the cost does."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1.1))
    names = [v.name for v in COMPARED]
    for place, name in enumerate(names):
        values = [100 * r["accuracy"] for r in rows if r["variant"] == name]
        mean = statistics.mean(values)
        left.barh(place, mean, color="0.75" if "x" not in name.split(",")[0] else "C0", height=0.6)
        left.plot(values, [place] * len(values), "k.", markersize=5)
        left.text(mean - 0.3, place, f"{mean:.1f}", ha="right", va="center")
    lowest = min(100 * r["accuracy"] for r in rows if r["variant"] in names)
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="test texts right (%); dots are seeds")
    left.set_xlim(left=max(0.0, lowest - 6))
    left.invert_yaxis()

    bars = [(r, o) for r in rows if r["variant"] == "4 x 16, probability" for o in range(len(ORIGINS))]
    places = [i + 0.8 * (i // len(ORIGINS)) for i in range(len(bars))]
    bottoms = [0.0] * len(bars)
    for expert in range(EXPERTS + 1):
        counts = [[line[o] for line in r["texts_by_expert_and_corpus"]] for r, o in bars]
        heights = [100 * of_bar[expert] / sum(of_bar) for of_bar in counts]
        name, color = ("none", "0.85") if expert == EXPERTS else (f"expert {expert}", f"C{expert}")
        middle.bar(places, heights, bottom=bottoms, width=0.85, label=name, color=color)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    middle.set_xticks(places, [f"{ORIGINS[o]}\nseed {r['seed']}" for r, o in bars], fontsize=7, rotation=45)
    middle.set(ylabel="of the corpus's test texts (%)", title="where texts go (probability gate, cost 0)")
    middle.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=3)

    sweep = [r for r in rows if r["variant"].startswith("cost") or r["variant"] in names[3:5]]
    costs = sorted({r["cost"] for r in sweep})
    for gate, color in (("probability", "C3"), ("integrated", "C0")):
        of_gate = [r for r in sweep if r["gate"] == gate]
        spots = [i for i, c in enumerate(costs) if any(r["cost"] == c for r in of_gate)]
        means = [100 * statistics.mean(r["skipped"] for r in of_gate if r["cost"] == costs[i]) for i in spots]
        right.plot(spots, means, "o-", color=color, label=f"{gate} gate")
        right.plot([costs.index(r["cost"]) for r in of_gate], [100 * r["skipped"] for r in of_gate], ".", color=color)
    right.set_xticks(range(len(costs)), [f"{c:g}" for c in costs])
    right.set(xlabel="cost of running anything (nats a text)", ylabel="test texts that run none (%)", ylim=(-3, 103))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train every variant per seed; the JSON file is rewritten after each run."""
    parser = make_parser("routing", __doc__)
    parser.add_argument("--train", type=int, default=400, metavar="N", help="training texts per corpus; default 400")
    parser.add_argument("--test", type=int, default=300, metavar="N", help="test texts per corpus; default 300")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1; default 3")
    parser.add_argument("--layers", type=layer_list, default=[-1], help="the layers that have adapters; default -1")
    arguments = parse(parser)
    shared, rows = Shared(arguments.train, arguments.test, tuple(arguments.layers)), []
    settings = {
        "backbone": f"SmolLM2-135M-Instruct, first {NUM_LAYERS} layers",
        "adapters_after_layers": [layer % NUM_LAYERS for layer in arguments.layers],
        "train_texts": [arguments.train] * 2,
        "test_texts": [arguments.test] * 2,
        "training": TRAINING,
    }
    for seed in range(arguments.seeds):
        for variant in (*COMPARED, *SWEEP):
            rows.append(shared.run(variant, seed))
            show(rows[-1])
            record(arguments.output / "routing.json", **settings, rows=rows)
        plot(rows, arguments.output / "routing.png")


if __name__ == "__main__":
    main()
