"""What the tests of reading and of making artifacts share."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.draft import Draft, Receipt

SCHEMA = pa.schema([("x", pa.int64()), ("source", pa.string())])


def table(start, stop):
    return pa.table(
        {"x": list(range(start, stop)), "source": ["s"] * (stop - start)}, schema=SCHEMA
    )


def draft(root, **config):
    return Draft(Root(str(root)), Spec("things", 1, config))


def publish(root, bounds=((0, 10), (10, 17)), **config):
    made = draft(root, **config)
    receipts = []
    for number, (start, stop) in enumerate(bounds):
        middle = (start + stop) // 2
        part = made.write(
            "things", f"{number}", SCHEMA, [table(start, middle), table(middle, stop)]
        )
        receipts.append(Receipt([part], stop - start))
        made.commit(f"{number}", receipts[-1])
    return made.publish(receipts, {"note": 1})


def files(root):
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file())


@pytest.fixture
def things():
    """Artifacts of the kind `things`, of 17 rows in two parts unless said otherwise."""
    return SimpleNamespace(schema=SCHEMA, table=table, draft=draft, publish=publish, files=files)
