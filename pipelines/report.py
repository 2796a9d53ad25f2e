"""report: everything a run made -> one self-contained HTML file."""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import MEAN
from clusterlib.batches.plan import BatchingConfig
from clusterlib.clusters import kmeans
from clusterlib.clusters.diagnostics import top_terms
from clusterlib.clusters.shards import Shards
from clusterlib.clusters.tree import Node
from pipelines.contamination import MEANING, examples, summary
from pipelines.evaluate import METRICS
from pipelines.shard import leaf_centroids
from pipelines.stage import Stage
from train.export import EXPORT
from train.measures import MEASURES
from train.progress import Progress

if TYPE_CHECKING:
    from pipelines.recipe import RunConfig
    from pipelines.run import Arm

REPORT = "report.html"
_SAMPLE_ROWS = 2000  # rows of each source that terms and examples are taken from
_NUM_TERMS = 8
_NUM_EXAMPLES = 3
_COLORS = ("#7a8794", "#d1495b", "#00798c", "#edae49", "#6a4c93", "#30638e")


class Report(Stage):
    """What a run found, as one HTML file."""

    kind = "report"

    def specs(self, arm: Arm) -> dict[str, Spec]:
        run = arm.run
        inputs = {
            f"model.{name}": model
            for name, other in run.arms.items()
            for model in other.specs("model").values()
        }
        inputs |= {
            f"contamination.{name}": table
            for name, other in run.arms.items()
            for table in other.specs("contamination").values()
        }
        inputs |= {f"scores.{scores.label}": scores for scores in run.specs("scores")}
        return {
            run.config.name: Spec(
                "report", 3, {"recipe": run.config}, inputs, label=run.config.name
            )
        }

    def make(self, specs: Sequence[Spec], root: Root) -> None:
        for spec in specs:
            _publish(Draft(root, spec), _html(_Found(spec, root)).encode())


STAGE = Report()


def _publish(draft: Draft, html: bytes) -> None:
    draft.unless_made(lambda: draft.publish([Receipt([draft.write_bytes("report", REPORT, html)])]))


class _Found:
    """What a report is about, opened.

    Attributes:
        arms: name of the arm -> kind -> artifacts, a source after the other.
        scores: by name of the run.
        contamination: by name of the arm.
    """

    def __init__(self, spec: Spec, root: Root) -> None:
        self.recipe: RunConfig = spec.config["recipe"]
        self.arms: dict[str, dict[str, list[Artifact]]] = {}
        self.scores: dict[str, Artifact] = {}
        self.contamination: dict[str, Artifact] = {}
        for name, made in spec.inputs.items():
            kind, _, owner = name.partition(".")
            if kind == "scores":
                self.scores[owner] = root.open(made)
            elif kind == "contamination":
                self.contamination[owner] = root.open(made)
            else:
                kinds = _by_kind(made)
                self.arms[owner] = {
                    kind: [root.open(spec) for spec in specs] for kind, specs in kinds.items()
                }

    @property
    def first(self) -> dict[str, list[Artifact]]:
        return next(iter(self.arms.values()))

    @functools.cached_property
    def models(self) -> dict[str, Artifact]:
        return {arm: kinds["model"][0] for arm, kinds in self.arms.items()}

    def artifacts(self) -> list[Artifact]:
        """All, each once."""
        found = [
            artifact
            for kinds in self.arms.values()
            for artifacts in kinds.values()
            for artifact in artifacts
        ]
        return list(
            {
                artifact.name: artifact
                for artifact in [*found, *self.contamination.values(), *self.scores.values()]
            }.values()
        )


def _by_kind(spec: Spec) -> dict[str, list[Spec]]:
    """A spec and all it is made from, first what is made first."""
    found: dict[str, dict[str, Spec]] = {}

    def visit(spec: Spec) -> None:
        for made_from in spec.inputs.values():
            visit(made_from)
        found.setdefault(spec.kind, {})[spec.name] = spec

    visit(spec)
    return {kind: list(specs.values()) for kind, specs in found.items()}


def _html(found: _Found) -> str:
    arms = list(found.arms)
    tables = score_tables(found.scores, arms)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    made = found.models[arms[-1]].manifest
    return environment.get_template("report.html.j2").render(
        name=found.recipe.name,
        description=found.recipe.description,
        verdict=verdict(tables[0], arms),
        tables=tables,
        funnel=_funnel(found),
        rejects=_rejects(found.first["pairs"]),
        held_out=_rejects(found.first["shards"]),
        contamination=_contamination(found.contamination),
        meaning=MEANING,
        curves=_curves(found.models),
        clusters=_clusters(found),
        fits={fit.label: fit.stats for fit in found.first["centroids"]},
        arms=_arm_rows(found.models),
        artifacts=_artifact_rows(found.artifacts()),
        versions=made["versions"],
        commit=made["commit"],
        config=yaml.safe_dump(
            found.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True
        ),
    )


@dataclass(frozen=True)
class ScoreTable:
    """One metric: a row for each run, a column for each test and the mean.

    Attributes:
        differences: last arm minus first arm, by column; empty with fewer than two arms.
    """

    metric: str
    columns: list[str]
    rows: list[tuple[str, list[float]]]
    differences: list[float]


def score_tables(scores: Mapping[str, Artifact], arms: Sequence[str]) -> list[ScoreTable]:
    """The score tables of all metrics, NDCG@10 first."""
    records = [row for artifact in scores.values() for row in artifact.read().to_pylist()]
    columns = list(dict.fromkeys(row["task"] for row in records if row["task"] != MEAN)) + [MEAN]
    tables = []
    for metric, title in METRICS.items():
        value = {
            (row["run"], row["task"]): row["value"] for row in records if row["metric"] == metric
        }
        rows = [(run, [value[run, column] for column in columns]) for run in scores]
        by_run = dict(rows)
        pairs = zip(by_run[arms[-1]], by_run[arms[0]], strict=True) if len(arms) > 1 else ()
        tables.append(ScoreTable(title, columns, rows, [last - first for last, first in pairs]))
    return tables


def format_scores(table: ScoreTable, arms: Sequence[str]) -> str:
    """A score table as text."""
    rows = [(run, [f"{value:.4f}" for value in values]) for run, values in table.rows]
    if table.differences:
        rows.append((f"{arms[-1]} - {arms[0]}", [f"{value:+.4f}" for value in table.differences]))
    width = max(len(run) for run, _ in [*rows, (table.metric, [])])
    widths = [max(7, len(column)) for column in table.columns]
    lines = [
        f"{table.metric:<{width}}  "
        + "  ".join(f"{c:>{w}}" for c, w in zip(table.columns, widths, strict=True))
    ]
    for run, values in rows:
        lines.append(
            f"{run:<{width}}  "
            + "  ".join(f"{v:>{w}}" for v, w in zip(values, widths, strict=True))
        )
    return "\n".join(lines)


def verdict(table: ScoreTable, arms: Sequence[str]) -> str:
    """Which of the first and the last arm did better, in one sentence."""
    if not table.differences:
        return ""
    first, last = arms[0], arms[-1]
    difference = table.differences[-1]
    wins = sum(value > 0 for value in table.differences[:-1])
    of_tests = (
        f"better on {wins} of {len(table.differences) - 1} tests; "
        "one seed, so small differences may be luck"
    )
    if difference > 0:
        return f"{last} beats {first} by {difference:.4f} mean {table.metric} ({of_tests})."
    return f"{last} does not beat {first} here: {difference:+.4f} mean {table.metric} ({of_tests})."


def _funnel(found: _Found) -> list[tuple[str, int, str]]:
    """(step, rows, remark) from what was read to what an epoch visits."""
    first = found.first
    left_out, kept_out = (sum(_rejects(first[kind]).values()) for kind in ("pairs", "shards"))
    num_read = sum(pairs.manifest["num_rows_in"] for pairs in first["pairs"])
    steps = [
        ("read", num_read, ""),
        ("usable pairs", _num_rows(first["pairs"]), f"{left_out:,} left out, by reason below"),
        ("embedded", _num_rows(first["embeddings"]), ""),
        ("in shards", _num_rows(first["shards"]), f"{kept_out:,} held out, by test below"),
    ]
    for arm, model in found.models.items():
        for phase in model.stats["phases"]:
            visits = phase["total"]
            rows = round(visits["coverage_fraction"] * visits["num_rows"])
            pure = f"{visits['pure_fraction']:.0%} of batches hold one stratum"
            remark = f"{phase['title']}: {visits['coverage_fraction']:.1%} covered, {pure}"
            steps.append((f"an epoch of {arm}", rows, remark))
    return steps


def _num_rows(artifacts: Sequence[Artifact]) -> int:
    return sum(artifact.num_rows for artifact in artifacts)


def _rejects(artifacts: Sequence[Artifact]) -> Counter[str]:
    """Rows that were left out, by reason."""
    counts: Counter[str] = Counter()
    for artifact in artifacts:
        counts.update(artifact.manifest["rejects"])
    return counts


def _contamination(tables: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """What of the tests occurs in training, once for all arms that train on the same pairs."""
    owners: dict[str, list[str]] = {}
    for arm, table in tables.items():
        owners.setdefault(table.name, []).append(arm)
    found = []
    for names in owners.values():
        made = tables[names[0]]
        counts = made.read().to_pylist()
        found.append(
            {
                "arms": names if len(owners) > 1 else [],
                "num_training_rows": made.stats["num_training_rows"],
                "summary": summary(counts),
                "counts": counts,
                "examples": examples(made.read("matches")),
            }
        )
    return found


def _arm_rows(models: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    rows = []
    for arm, model in models.items():
        stats, batching = model.stats, model.config["batching"]
        pairs = stats["num_steps"] * batching["global_batch_size"]
        rows.append(
            {
                "arm": arm,
                "phases": ", then ".join(phase["title"] for phase in stats["phases"]),
                "num_strata": ", ".join(
                    f"{phase['total']['num_strata']:,}" for phase in stats["phases"]
                ),
                **{name: batching[name] for name in ("leftover", "global_batch_size")},
                "num_steps": stats["num_steps"],
                "num_skipped_steps": stats["num_skipped_steps"],
                "kept_step": stats["kept_step"],
                "num_parameters": stats["num_parameters"],
                "pairs_per_second": pairs / stats["train_seconds"],
                "waiting_fraction": stats["data_seconds"] / stats["train_seconds"],
                "model": model.folder(EXPORT),
            }
        )
    return rows


def _artifact_rows(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    return [
        {
            "name": artifact.name,
            "label": artifact.label,
            "num_rows": artifact.num_rows,
            "num_bytes": sum(part["num_bytes"] for part in artifact.manifest["parts"]),
            "created": artifact.manifest["created_utc"],
        }
        for artifact in artifacts
    ]


def _curves(models: Mapping[str, Artifact]) -> list[tuple[str, str]]:
    """(title, SVG) of what tests in the loop found, where there were any, and of what the steps
    recorded.
    """
    colors = dict(zip(models, _cycle(len(models)), strict=True))
    tested = {arm: model for arm, model in models.items() if model.parts("tests")}
    drawn = []
    if tested:
        title = "Mean NDCG@10 of the tests in the loop; a ring marks the weights that were kept"
        drawn.append((title, _svg(functools.partial(_draw_tests, tested, colors))))
    steps = {arm: model.read("steps") for arm, model in models.items()}
    for measure in MEASURES:
        if measure.chart:
            title = f"{measure.chart}: {measure.description}"
            drawn.append((title, _svg(functools.partial(_draw_steps, steps, measure.name, colors))))
    return drawn


def _draw_tests(models: Mapping[str, Artifact], colors: Mapping[str, str], axes: Any) -> None:
    for arm, model in models.items():
        means = Progress(tests=model.read("tests").to_pylist()).means()
        steps, values = list(means), list(means.values())
        axes.plot(
            steps, values, color=colors[arm], linewidth=1.8, marker="o", markersize=3, label=arm
        )
        kept = model.stats["kept_step"]
        axes.plot(
            [kept], [means[kept]], color=colors[arm], marker="o", markersize=9, fillstyle="none"
        )


def _draw_steps(
    steps: Mapping[str, pa.Table], column: str, colors: Mapping[str, str], axes: Any
) -> None:
    """One line for each arm, smoothed over 5% of the run."""
    for arm, table in steps.items():
        table = table.filter(pc.is_finite(table[column]))  # a skipped step may have none
        if not table.num_rows:
            continue
        at, values = table["step"].to_numpy(), table[column].to_numpy()
        window = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(at, values, color=colors[arm], alpha=0.18, linewidth=0.7)
        axes.plot(at[window - 1 :], smooth, color=colors[arm], linewidth=1.8, label=arm)


def _svg(draw: Callable[[Any], None]) -> str:
    """A chart over steps."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "strata"}):
        figure, axes = plt.subplots(figsize=(5.2, 2.6), layout="constrained")
        draw(axes)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e7ea", linewidth=0.8)
        axes.legend(frameon=False)
        image = io.StringIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return image.getvalue()[image.getvalue().index("<svg") :]


def _cycle(count: int) -> list[str]:
    return [_COLORS[place % len(_COLORS)] for place in range(count)]


@dataclass(frozen=True)
class ClusterRow:
    """A cluster as the report shows it."""

    number: int
    num_rows: int
    share_of_largest: float
    terms: list[str]
    examples: list[str]


def _clusters(found: _Found) -> list[dict[str, Any]]:
    """Clusters of every source at the k of the first phase that batches by cluster (else of the
    first phase).
    """
    phases = [
        (arm, phase)
        for arm, model in found.models.items()
        for phase in BatchingConfig.model_validate(model.config["batching"]).schedule()
    ]
    arm, phase = next((each for each in phases if each[1].has_clusters), phases[0])
    kinds = found.arms[arm]
    index = Shards(kinds["shards"]).index
    sources = []
    for embeddings, centroids in zip(kinds["embeddings"], kinds["centroids"], strict=True):
        source = embeddings.label
        tree, starts = index.trees[source], index.leaf_starts[source]
        nodes = tree.cut(min(phase.k or tree.num_leaves, tree.num_leaves))
        sizes = [
            int(starts[node.first_leaf + node.num_leaves] - starts[node.first_leaf])
            for node in nodes
        ]
        rows = _describe(embeddings, centroids, nodes, sizes)
        sources.append({"source": source, "num_rows": sum(sizes), "rows": rows})
    return sources


def _describe(
    embeddings: Artifact, centroids: Artifact, nodes: Sequence[Node], sizes: Sequence[int]
) -> list[ClusterRow]:
    """Terms and examples of a source's clusters, from its first rows."""
    field: kmeans.ClusterField = centroids.config["cluster"]["field"]
    tables: list[pa.Table] = []
    for table in embeddings.row_groups(["query", "passage", *kmeans.columns(field)]):
        tables.append(table)
        if sum(table.num_rows for table in tables) >= _SAMPLE_ROWS:
            break
    table = pa.concat_tables(tables).slice(0, _SAMPLE_ROWS)
    leaves, similarity = kmeans.assign(
        kmeans.field_vectors(table, field), leaf_centroids(centroids)
    )
    ends = np.cumsum([node.num_leaves for node in nodes])
    clusters = np.searchsorted(ends, leaves, side="right")
    queries = table["query"].to_pylist()
    texts = [
        f"{query} {passage}"
        for query, passage in zip(queries, table["passage"].to_pylist(), strict=True)
    ]
    terms = top_terms(texts, clusters, len(nodes), _NUM_TERMS)
    rows = []
    for number, size in enumerate(sizes):
        members = np.flatnonzero(clusters == number)
        nearest = members[np.argsort(-similarity[members], kind="stable")]
        examples = list(dict.fromkeys(queries[row] for row in nearest))[:_NUM_EXAMPLES]
        rows.append(ClusterRow(number, size, size / max(sizes), terms[number], examples))
    return rows
