"""report: everything a run made -> one self-contained HTML file."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from clusterlib.clusters.tree import Node
from pipelines.cluster import of_source
from pipelines.contamination import MEANING, examples, summary
from pipelines.evaluate import METRICS
from pipelines.shard import leaf_centroids
from train.data import shard_index
from train.loop import Progress

REPORT = "report.html"
_SAMPLE_ROWS = 2000  # rows of each source that terms and examples are taken from
_NUM_TERMS = 8
_NUM_EXAMPLES = 3
_COLORS = ("#7a8794", "#d1495b", "#00798c", "#edae49", "#6a4c93", "#30638e")


def report_spec(name: str, inputs: Mapping[str, Mapping[str, str]]) -> Spec:
    """What a report is made from: names of artifacts, of each arm by kind, and of scores by run
    under "".
    """
    flat = {
        f"{kind}.{owner}" if owner else f"scores.{kind}": artifact.partition("/")[2]
        for owner, artifacts in inputs.items()
        for kind, artifact in artifacts.items()
    }
    return Spec("report", 2, {"name": name}, flat)


def report(
    name: str, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]], root: Root
) -> Artifact:
    """Write `report.html`.

    Args:
        config: the whole resolved recipe, to be shown.
        inputs: see `report_spec`; all must be finished.
    """
    spec = report_spec(name, inputs)
    made = root.find(spec)
    if made is not None:
        return made

    def opened(artifact: str) -> Artifact:
        return root.open(artifact, "run the recipe's earlier stages first")

    arms = {
        arm: {kind: opened(found) for kind, found in kinds.items()}
        for arm, kinds in inputs.items()
        if arm
    }
    scores = {run: opened(found) for run, found in inputs[""].items()}
    tables = score_tables(scores, list(arms))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    first = next(iter(arms.values()))
    html = environment.get_template("report.html.j2").render(
        name=name,
        description=config["description"],
        verdict=verdict(tables[0], list(arms)),
        tables=tables,
        funnel=_funnel(first, arms),
        rejects=first["pairs"].manifest["rejects"],
        held_out=first["shards"].manifest["rejects"],
        contamination=_contamination(arms),
        meaning=MEANING,
        curves=_curves(arms),
        clusters=_clusters(arms),
        fits=first["centroids"].stats["fits"],
        arms=_arm_rows(arms),
        artifacts=_artifact_rows(
            [
                *[artifact for kinds in arms.values() for artifact in kinds.values()],
                *scores.values(),
            ]
        ),
        versions=first["shards"].manifest["versions"],
        commit=first["shards"].manifest["commit"],
        config=yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
    )
    draft = Draft(root, spec)
    return draft.publish([Receipt([draft.write_bytes("report", REPORT, html.encode())])])


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


def _funnel(
    first: Mapping[str, Artifact], arms: Mapping[str, Mapping[str, Artifact]]
) -> list[tuple[str, int, str]]:
    """(step, rows, remark) from what was read to what an epoch visits."""
    pairs = first["pairs"]
    steps = [
        ("read", pairs.manifest["num_rows_in"], ""),
        (
            "usable pairs",
            pairs.num_rows,
            f"{sum(pairs.manifest['rejects'].values()):,} left out, by reason below",
        ),
        ("embedded", first["embeddings"].num_rows, ""),
        (
            "in shards",
            first["shards"].num_rows,
            f"{sum(first['shards'].manifest['rejects'].values()):,} held out, by test below",
        ),
    ]
    for arm, kinds in arms.items():
        for phase in kinds["model"].stats["phases"]:
            visits = phase["total"]
            rows = round(visits["coverage_fraction"] * visits["num_rows"])
            pure = f"{visits['pure_fraction']:.0%} of batches hold one stratum"
            remark = f"{phase['title']}: {visits['coverage_fraction']:.1%} covered, {pure}"
            steps.append((f"an epoch of {arm}", rows, remark))
    return steps


def _contamination(arms: Mapping[str, Mapping[str, Artifact]]) -> list[dict[str, Any]]:
    """What of the tests occurs in training, once for all arms that train on the same pairs."""
    owners: dict[str, list[str]] = {}
    for arm, kinds in arms.items():
        owners.setdefault(kinds["contamination"].name, []).append(arm)
    found = []
    for names in owners.values():
        made = arms[names[0]]["contamination"]
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


def _arm_rows(arms: Mapping[str, Mapping[str, Artifact]]) -> list[dict[str, Any]]:
    rows = []
    for arm, kinds in arms.items():
        stats, batching = kinds["model"].stats, kinds["model"].config["batching"]
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
                "model": kinds["model"].path,
            }
        )
    return rows


def _artifact_rows(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    unique = {artifact.name: artifact for artifact in artifacts}
    return [
        {
            "name": name,
            "num_rows": artifact.num_rows,
            "num_bytes": sum(part["num_bytes"] for part in artifact.manifest["parts"]),
            "created": artifact.manifest["created_utc"],
        }
        for name, artifact in unique.items()
    ]


def _curves(arms: Mapping[str, Mapping[str, Artifact]]) -> list[tuple[str, str]]:
    """(title, SVG) of what tests in the loop found, where there were any, and of what the steps
    recorded.
    """
    models = {arm: kinds["model"] for arm, kinds in arms.items()}
    colors = dict(zip(models, _cycle(len(models)), strict=True))
    tested = {arm: model for arm, model in models.items() if model.parts("tests")}
    drawn = []
    if tested:
        title = "Mean NDCG@10 of the tests in the loop; a ring marks the weights that were kept"
        drawn.append((title, _svg(functools.partial(_draw_tests, tested, colors))))
    steps = {arm: model.read("steps") for arm, model in models.items()}
    for column, title in (
        ("loss", "Loss"),
        ("accuracy", "In-batch accuracy"),
        ("hardness", "Hardness: similarity of the 10 nearest negatives"),
        ("positive_similarity", "Similarity of positives"),
    ):
        drawn.append((title, _svg(functools.partial(_draw_steps, steps, column, colors))))
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


def _clusters(arms: Mapping[str, Mapping[str, Artifact]]) -> list[dict[str, Any]]:
    """Clusters of every source at the k of the first phase that batches by cluster (else of the
    first phase).
    """
    phases = [
        (kinds, phase)
        for kinds in arms.values()
        for phase in BatchingConfig.model_validate(kinds["model"].config["batching"]).schedule()
    ]
    kinds, phase = next((found for found in phases if found[1].has_clusters), phases[0])
    index = shard_index(kinds["shards"])
    centroids = leaf_centroids(kinds["centroids"])
    field = kinds["centroids"].config["cluster"]["field"]
    sources = []
    for source, tree in index.trees.items():
        nodes = tree.cut(min(phase.k or tree.num_leaves, tree.num_leaves))
        starts = index.leaf_starts[source]
        sizes = [
            int(starts[node.first_leaf + node.num_leaves] - starts[node.first_leaf])
            for node in nodes
        ]
        rows = _describe(kinds["embeddings"], source, field, nodes, sizes, centroids[source])
        sources.append({"source": source, "num_rows": sum(sizes), "rows": rows})
    return sources


def _describe(
    embeddings: Artifact,
    source: str,
    field: kmeans.ClusterField,
    nodes: Sequence[Node],
    sizes: Sequence[int],
    centroids: np.ndarray,
) -> list[ClusterRow]:
    """Terms and examples of a source's clusters, from its first rows."""
    tables: list[pa.Table] = []
    for table in of_source(embeddings, source, ["query", "passage", *kmeans.columns(field)]):
        tables.append(table)
        if sum(table.num_rows for table in tables) >= _SAMPLE_ROWS:
            break
    table = pa.concat_tables(tables).slice(0, _SAMPLE_ROWS)
    leaves, similarity = kmeans.assign(kmeans.field_vectors(table, field), centroids)
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
