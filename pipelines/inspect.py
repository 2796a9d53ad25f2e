"""inspect: what an artifact holds and what it was made from, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from clusterlib.artifacts.artifact import Artifact, lineage


def listing(artifacts: Sequence[Artifact]) -> str:
    """One line for each artifact."""
    lines = [f"{'artifact':<30} {'rows':>12} {'MB':>9}  made (UTC)"]
    for artifact in artifacts:
        size = sum(part["num_bytes"] for part in artifact.manifest["parts"]) / 1e6
        lines.append(
            f"{artifact.name:<30} {artifact.num_rows:>12,} {size:>9.1f}  "
            f"{artifact.manifest['created_utc']}"
        )
    return "\n".join(lines)


def describe(artifact: Artifact) -> dict[str, Any]:
    """The manifest, with the columns and size of each table in place of its parts, and the
    lineage.
    """
    manifest = dict(artifact.manifest)
    tables: dict[str, dict[str, Any]] = {}
    for table in dict.fromkeys(part["table"] for part in manifest.pop("parts")):
        parts = artifact.parts(table)
        tables[table] = {
            "num_rows": sum(part.num_rows for part in parts),
            "num_files": len(parts),
            "num_bytes": sum(part.num_bytes for part in parts),
        }
        if parts[0].path.endswith(".parquet"):
            with artifact.open_part(parts[0]) as file:
                schema = file.schema_arrow
            tables[table]["columns"] = {field.name: str(field.type) for field in schema}
        else:
            tables[table]["files"] = [part.path for part in parts]
    made_from = [
        {"depth": depth, "name": name, "found": found is not None}
        for depth, name, found in lineage(artifact)
    ]
    return {
        "path": artifact.path,
        **manifest,
        "tables": tables,
        "made_from": made_from,
        "contamination": _contamination(artifact),
    }


def _contamination(artifact: Artifact) -> dict[str, Any] | None:
    """The counts and examples of a contamination table; None of other artifacts."""
    if artifact.kind != "contamination":
        return None
    from pipelines.contamination import examples

    return {
        "counts": artifact.read().to_pylist(),
        "examples": examples(artifact.read("matches")),
    }


def as_text(described: Mapping[str, Any]) -> str:
    """What `describe` returns, for people."""
    lines = [described["path"], f"made {described['created_utc']} at commit {described['commit']}"]
    lines.append(", ".join(f"{name} {version}" for name, version in described["versions"].items()))
    lines.append(
        f"rows: {described['num_rows_in']:,} in = {described['num_rows_out']:,} out + "
        f"{sum(described['rejects'].values()):,} left out"
    )
    lines += [f"  {count:>10,}  {reason}" for reason, count in described["rejects"].items()]
    for name, table in described["tables"].items():
        lines.append(
            f"{name}: {table['num_rows']:,} rows, {table['num_files']} files, "
            f"{table['num_bytes'] / 1e6:.1f} MB"
        )
        lines += [f"  {column}: {kind}" for column, kind in table.get("columns", {}).items()]
        lines += [f"  {path}" for path in table.get("files", [])]
    for title in ("stats", "config", "origin"):
        if described[title]:
            text = yaml.safe_dump(
                dict(described[title]), sort_keys=False, default_flow_style=None, width=110
            )
            lines += [f"{title}:", *(f"  {line}" for line in text.splitlines())]
    if described["contamination"]:
        from pipelines.contamination import MEANING, format_contamination

        table = described["contamination"]
        lines += [format_contamination(table["counts"], table["examples"]), MEANING]
    lines.append("made from:")
    lines += [
        f"  {'  ' * it['depth']}{it['name']}{'' if it['found'] else '  (gone)'}"
        for it in described["made_from"]
    ]
    return "\n".join(lines) + "\n"
