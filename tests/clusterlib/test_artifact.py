import errno
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from clusterlib.artifact import Draft, Receipt, Root, Spec, lineage
from clusterlib.errors import StrataError

SCHEMA = pa.schema([("x", pa.int64()), ("source", pa.string())])


def table(start, stop):
    return pa.table({"x": list(range(start, stop)), "source": ["s"] * (stop - start)}, schema=SCHEMA)


def draft(root, **config):
    return Draft(Root(str(root)), Spec("things", 1, config))


def publish(root, bounds=((0, 10), (10, 17)), **config):
    made = draft(root, **config)
    receipts = []
    for number, (start, stop) in enumerate(bounds):
        middle = (start + stop) // 2
        part = made.write("things", f"{number}", SCHEMA, [table(start, middle), table(middle, stop)])
        receipts.append(Receipt([part], stop - start))
        made.commit(f"{number}", receipts[-1])
    return made.publish(receipts, {"note": 1})


def files(root):
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file())


def test_without_a_manifest_there_is_no_artifact(tmp_path):
    made = draft(tmp_path)
    made.commit("0", Receipt([made.write("things", "0", SCHEMA, [table(0, 3)])], 3))
    assert made.root.find(made.spec) is None
    assert made.root.artifacts() == []
    with pytest.raises(StrataError, match="no finished artifact there; run it"):
        made.root.open(made.spec.name, "run it")


def test_published_artifact_reads_back_and_verifies(tmp_path):
    artifact = publish(tmp_path)
    assert artifact.read()["x"].to_pylist() == list(range(17))
    assert artifact.num_rows == 17 and artifact.stats == {"note": 1}
    found = Root(str(tmp_path)).find(Spec("things", 1, {}))
    assert found is not None and found.manifest == artifact.manifest
    artifact.verify()


def test_another_setting_version_or_input_makes_another_artifact():
    specs = [
        Spec("things", 1, {"a": 1}),
        Spec("things", 1, {"a": 2}),
        Spec("things", 2, {"a": 1}),
        Spec("things", 1, {"a": 1}, {"pairs": "0"}),
        Spec("things", 1, {"a": 1}, {}, {"file": 5}),
    ]
    assert len({spec.fingerprint for spec in specs}) == len(specs)


def test_orphans_and_receipts_are_swept_and_never_read(tmp_path):
    made = draft(tmp_path)
    folder = Path(made.path) / "things"
    folder.mkdir(parents=True)
    (folder / "orphan.parquet").write_bytes(b"half a file")
    (folder / ".0.parquet.123").write_bytes(b"temporary")
    artifact = publish(tmp_path)
    assert artifact.read().num_rows == 17
    assert files(artifact.path) == sorted(["manifest.json", *(part.path for part in artifact.parts())])


def test_two_drivers_sweep_at_once(tmp_path):
    artifact = publish(tmp_path)
    made = draft(tmp_path)
    for _ in range(20):
        for number in range(20):
            made.commit(f"{number}", Receipt([]))
        with ThreadPoolExecutor(2) as drivers:
            list(drivers.map(made.sweep, [artifact] * 2))
        assert files(artifact.path) == sorted(["manifest.json", *(part.path for part in artifact.parts())])


def test_a_failed_write_leaves_nothing(tmp_path):
    def groups():
        yield table(0, 3)
        raise OSError("disk full")

    made = draft(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        made.write("things", "0", SCHEMA, groups())
    assert files(tmp_path) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    def groups():
        yield table(0, 3)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StrataError, match="no space is left there; free some and run the same command again"):
        draft(tmp_path).write("things", "0", SCHEMA, groups())
    assert files(tmp_path) == []


def test_a_task_that_runs_twice_with_other_bytes_changes_nothing_that_is_named(tmp_path):
    made = draft(tmp_path)
    part = made.write("things", "0", SCHEMA, [table(0, 3)])
    artifact = made.publish([Receipt([part], 3)])
    late = made.write("things", "0", SCHEMA, [table(0, 2), table(2, 3)])  # the same rows in other row groups
    assert late.path != part.path
    artifact.verify()
    again = made.publish([Receipt([late], 3)])
    assert again.manifest == artifact.manifest and made.root.find(made.spec).parts() == [part]


def test_lost_rows_are_never_published(tmp_path):
    made = draft(tmp_path)
    part = made.write("things", "0", SCHEMA, [table(0, 3)])
    with pytest.raises(RuntimeError, match="5 rows in, 3 out and 1 refused"):
        made.publish([Receipt([part], 5, {"bad": 1})])
    assert made.root.find(made.spec) is None
    made.publish([Receipt([part], 5, {"bad": 1, "worse": 1})])


def test_a_retried_task_gives_the_same_bytes_and_digest(tmp_path):
    first, second = publish(tmp_path / "a"), publish(tmp_path / "b")
    assert first.manifest["parts"] == second.manifest["parts"]
    assert first.manifest["digest"] == second.manifest["digest"]


def test_receipts_survive_json(tmp_path):
    made = draft(tmp_path)
    receipt = Receipt([made.write("things", "0", SCHEMA, [table(0, 3)])], 4, {"bad": 1}, {"runs": [["s", 1]]})
    made.commit("0", receipt)
    assert made.receipts() == {"0"}
    assert made.receipt("0") == receipt
    assert made.receipt("1") is None


@pytest.mark.parametrize("damage", [os.remove, lambda path: Path(path).write_bytes(b"PAR1")])
def test_a_damaged_part_is_named_with_the_remedy(tmp_path, damage):
    artifact = publish(tmp_path)
    damage(f"{artifact.path}/{artifact.parts()[1].path}")
    with pytest.raises(
        StrataError, match=r"things/1-\w+\.parquet: named in the manifest but missing or damaged.*again"
    ):
        artifact.read()
    with pytest.raises(StrataError, match=r"things/1-\w+\.parquet"):
        artifact.verify()


def test_slices_cover_the_table_in_order_whatever_their_size(tmp_path):
    artifact = publish(tmp_path, bounds=((0, 10), (10, 10), (10, 17)))
    for size in range(1, 20):
        pieces = artifact.slices(size)
        assert len({piece.id for piece in pieces}) == len(pieces)
        rows = [row for piece in pieces for row in artifact.read_slice(piece)["x"].to_pylist()]
        assert rows == list(range(17))
        assert all(piece.num_rows <= size for piece in pieces)


def test_root_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StrataError, match="cannot be written"):
        Root(str(tmp_path / "file" / "root")).check_writable()
    Root(str(tmp_path / "new")).check_writable()
    assert files(tmp_path / "new") == []


def test_other_file_systems_go_through_fsspec(tmp_path):
    root = Root("memory://workspace")
    made = Draft(root, Spec("things", 1, {}))
    part = made.write("things", "0", SCHEMA, [table(0, 3)])
    artifact = made.publish([Receipt([part], 3)])
    assert artifact.read()["x"].to_pylist() == [0, 1, 2]
    assert not root.is_local
    made.root.fs.create_dir(f"{artifact.path}/extra")
    made.write_bytes("extra", "extra/a.txt", b"hello")
    assert (artifact.download("extra", tmp_path / "copy") / "a.txt").read_bytes() == b"hello"


def test_drafts_travel_to_workers(tmp_path):
    made = pickle.loads(pickle.dumps(draft(tmp_path)))  # noqa: S301 - what Ray does with it
    assert made.write("things", "0", SCHEMA, [table(0, 3)]).num_rows == 3


def test_lineage_tells_what_is_gone(tmp_path):
    first = publish(tmp_path)
    second = Draft(first.root, Spec("other", 1, {}, {"things": first.fingerprint, "model.a": "0123"})).publish([])
    assert [(depth, name) for depth, name, _ in lineage(second)] == [
        (0, second.name),
        (1, first.name),
        (1, "model/0123"),
    ]
    assert json.loads((Path(second.path) / "manifest.json").read_text())["inputs"]["things"] == first.fingerprint
