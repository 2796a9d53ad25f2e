import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.storage import Patient
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
            list(drivers.map(Draft.find, [made] * 2))
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


def test_files_that_were_deleted_are_never_named(things, tmp_path):
    """Item 12: the manifest names what is there."""
    made = things.draft(tmp_path)
    part = made.write("things", "0", things.schema, [things.table(0, 3)])
    Path(made.path, part.path).unlink()
    with pytest.raises(StrataError, match=f"^{made.path}: files were deleted .* run the same comm"):
        made.publish([Receipt([part], 3)])
    assert made.root.find(made.spec) is None


@pytest.mark.parametrize(
    ("damage", "state"), [(Path.unlink, "missing"), (lambda p: p.write_bytes(b"PAR1"), "of 4 byt")]
)
def test_an_artifact_whose_files_are_gone_is_not_done(things, tmp_path, damage, state):
    artifact = things.publish(tmp_path)
    damage(Path(artifact.path, artifact.parts()[1].path))
    for look in (
        things.draft(tmp_path).find,
        lambda: artifact.root.find(things.draft(tmp_path).spec),
        lambda: artifact.root.open(things.draft(tmp_path).spec),
        lambda: things.draft(tmp_path).publish([]),
    ):
        with pytest.raises(
            StrataError,
            match=rf"things/1-\w+.parquet: named .* but {state}.*; delete {artifact.path} and run",
        ):
            look()


def test_a_sweep_that_is_killed_leaves_no_receipt_of_parts_that_are_gone(
    things, tmp_path, monkeypatch
):
    artifact = things.publish(tmp_path)
    made = things.draft(tmp_path)
    late = made.write("late", "0", things.schema, [things.table(0, 3)])
    made.commit("0", Receipt([late], 3))
    deleted = []

    def delete(fs, info):
        deleted.append(info.base_name)
        raise KeyboardInterrupt

    monkeypatch.setattr("clusterlib.artifacts.draft.delete", delete)
    with pytest.raises(KeyboardInterrupt):
        made.find()
    assert deleted == ["receipts"]
    monkeypatch.undo()
    assert made.find().manifest == artifact.manifest  # the next run sweeps
    assert things.files(artifact.path) == sorted(
        ["manifest.json", *(part.path for part in artifact.parts())]
    )


def test_finding_what_is_finished_costs_a_read_and_a_listing(things, tmp_path):
    """Item 15: the common case, in which there is nothing to sweep."""
    things.publish(tmp_path)
    calls = []

    class Counting(Patient):
        def _call(self, name, *arguments, **options):
            calls.append(name)
            return super()._call(name, *arguments, **options)

    made = things.draft(tmp_path)
    store = pafs.PyFileSystem(Counting(pafs.LocalFileSystem()))
    made.root.__dict__["_resolved"] = store, str(tmp_path)
    assert made.find() is not None
    assert calls == ["open_input_stream", "get_file_info"]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_late_writer_of_other_bytes_changes_no_file_and_no_folder(things, tmp_path, order):
    """Item 13, whoever publishes first."""
    made = things.draft(tmp_path / "root")
    receipts = []
    for number in range(2):
        folder = tmp_path / f"{number}"
        (folder / "inner").mkdir(parents=True)
        (folder / "same.txt").write_text("same")
        (folder / "inner" / "weights").write_bytes(bytes([number]))
        files = made.write_folder("export", folder)
        receipts.append(Receipt([*files, made.write_bytes("r", "r/r.html", bytes([number]))]))
    first, second = (receipts[number] for number in order)
    artifact = made.publish([first])
    assert made.publish([second]).manifest == artifact.manifest
    made.write_folder("export", tmp_path / f"{order[1]}")
    made.write_bytes("r", "r/r.html", bytes([order[1]]))
    artifact.verify()
    export = artifact.download("export", tmp_path / "unused")
    assert things.files(export) == ["inner/weights", "same.txt"]
    assert (export / "inner" / "weights").read_bytes() == bytes([order[0]])
    (html,) = artifact.parts("r")
    assert Path(artifact.path, html.path).suffix == ".html"


def test_a_folder_that_changed_since_is_not_handed_out(things, tmp_path):
    made = things.draft(tmp_path / "root")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "vocab.txt").write_text("rose")
    artifact = made.publish([Receipt(made.write_folder("tokenizer", tmp_path / "in"))])
    Path(artifact.folder("tokenizer"), "vocab.txt").write_text("rosf")
    with pytest.raises(StrataError, match=r"vocab.txt: its bytes differ .*; delete .* and run its"):
        artifact.download("tokenizer", tmp_path / "unused")


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
