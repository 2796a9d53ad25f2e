"""inspect: what an artifact holds and what it was made from, as text."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from clusterlib.artifact import Artifact, lineage


def listing(artifacts: Sequence[Artifact]) -> str:
    """One line for each artifact."""
    lines = [f"{'artifact':<30} {'rows':>12} {'MB':>9}  made (UTC)"]
    for artifact in artifacts:
        size = sum(part["num_bytes"] for part in artifact.manifest["parts"]) / 1e6
        lines.append(f"{artifact.name:<30} {artifact.num_rows:>12,} {size:>9.1f}  {artifact.manifest['created_utc']}")
    return "\n".join(lines)


def describe(artifact: Artifact) -> str:
    """Rows, rejects, schema, stats, config and lineage of one artifact."""
    manifest = artifact.manifest
    lines = [artifact.path, f"made {manifest['created_utc']} at commit {manifest['commit']}"]
    lines.append(", ".join(f"{name} {version}" for name, version in manifest["versions"].items()))
    lines.append(
        f"rows: {manifest['num_rows_in']:,} in = {manifest['num_rows_out']:,} out + "
        f"{sum(manifest['rejects'].values()):,} left out"
    )
    lines += [f"  {count:>10,}  {reason}" for reason, count in manifest["rejects"].items()]
    for table in dict.fromkeys(part["table"] for part in manifest["parts"]):
        parts = artifact.parts(table)
        size = sum(part.num_bytes for part in parts) / 1e6
        lines.append(f"{table}: {sum(part.num_rows for part in parts):,} rows, {len(parts)} files, {size:.1f} MB")
        if parts[0].path.endswith(".parquet"):
            schema = artifact.open_parquet(parts[0]).schema_arrow
            lines += [f"  {field.name}: {field.type}" for field in schema]
        else:
            lines += [f"  {part.path}" for part in parts]
    for title, content in (("stats", manifest["stats"]), ("config", manifest["config"])):
        if content:
            text = yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None, width=110)
            lines += [f"{title}:", *(f"  {line}" for line in text.splitlines())]
    lines.append("made from:")
    lines += [f"  {'  ' * depth}{name}{'' if found else '  (gone)'}" for depth, name, found in lineage(artifact)]
    return "\n".join(lines) + "\n"
