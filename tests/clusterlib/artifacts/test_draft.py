import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clusterlib.artifacts.draft import Receipt
from clusterlib.errors import StrataError


def test_orphans_and_receipts_are_swept_and_never_read(things, tmp_path):
    made = things.draft(tmp_path)
    folder = Path(made.path) / "things"
    folder.mkdir(parents=True)
    (folder / "orphan.parquet").write_bytes(b"half a file")
    (folder / ".0.parquet.123").write_bytes(b"temporary")
    artifact = things.publish(tmp_path)
    assert artifact.read().num_rows == 17
    assert things.files(artifact.path) == sorted(
        ["manifest.json", *(part.path for part in artifact.parts())]
    )


def test_two_drivers_sweep_at_once(things, tmp_path):
    artifact = things.publish(tmp_path)
    made = things.draft(tmp_path)
    for _ in range(20):
        for number in range(20):
            made.commit(f"{number}", Receipt([]))
        with ThreadPoolExecutor(2) as drivers:
            list(drivers.map(made.sweep, [artifact] * 2))
        assert things.files(artifact.path) == sorted(
            ["manifest.json", *(part.path for part in artifact.parts())]
        )


def test_a_failed_write_leaves_nothing(things, tmp_path):
    def groups():
        yield things.table(0, 3)
        raise OSError("disk full")

    made = things.draft(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        made.write("things", "0", things.schema, groups())
    assert things.files(tmp_path) == []


def test_a_full_disk_is_said_and_leaves_nothing(things, tmp_path):
    def groups():
        yield things.table(0, 3)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        StrataError, match="no space is left there; free some and run the same command again"
    ):
        things.draft(tmp_path).write("things", "0", things.schema, groups())
    assert things.files(tmp_path) == []


def test_a_task_that_runs_twice_with_other_bytes_changes_nothing_that_is_named(things, tmp_path):
    made = things.draft(tmp_path)
    part = made.write("things", "0", things.schema, [things.table(0, 3)])
    artifact = made.publish([Receipt([part], 3)])
    late = made.write(
        "things", "0", things.schema, [things.table(0, 2), things.table(2, 3)]
    )  # the same rows in other row groups
    assert late.path != part.path
    artifact.verify()
    again = made.publish([Receipt([late], 3)])
    assert again.manifest == artifact.manifest and made.root.find(made.spec).parts() == [part]


def test_lost_rows_are_never_published(things, tmp_path):
    made = things.draft(tmp_path)
    part = made.write("things", "0", things.schema, [things.table(0, 3)])
    with pytest.raises(RuntimeError, match="5 rows in, 3 out and 1 refused"):
        made.publish([Receipt([part], 5, {"bad": 1})])
    assert made.root.find(made.spec) is None
    made.publish([Receipt([part], 5, {"bad": 1, "worse": 1})])


def test_a_retried_task_gives_the_same_bytes_and_digest(things, tmp_path):
    first, second = things.publish(tmp_path / "a"), things.publish(tmp_path / "b")
    assert first.manifest["parts"] == second.manifest["parts"]
    assert first.manifest["digest"] == second.manifest["digest"]


def test_receipts_survive_json(things, tmp_path):
    made = things.draft(tmp_path)
    receipt = Receipt(
        [made.write("things", "0", things.schema, [things.table(0, 3)])],
        4,
        {"bad": 1},
        {"runs": [["s", 1]]},
    )
    made.commit("0", receipt)
    assert made.receipts() == {"0"}
    assert made.receipt("0") == receipt
    assert made.receipt("1") is None


@pytest.mark.parametrize("text", ["", '{"parts": [', "[]", "{}", '{"parts": [{}]}', "\xff"])
def test_a_damaged_receipt_is_one_message(things, tmp_path, text):
    made = things.draft(tmp_path)
    made.commit("0", Receipt([]))
    Path(made.path, "receipts", "0.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StrataError, match=r"receipts/0\.json: damaged.*; delete it, and the same"):
        made.receipt("0")


def test_drafts_travel_to_workers(things, tmp_path):
    made = pickle.loads(pickle.dumps(things.draft(tmp_path)))  # noqa: S301 - what Ray does with it
    assert made.write("things", "0", things.schema, [things.table(0, 3)]).num_rows == 3
