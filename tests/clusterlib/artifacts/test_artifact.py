import json
import os
import pickle
from pathlib import Path

import pytest

from clusterlib.artifacts.artifact import Root, Spec, lineage
from clusterlib.artifacts.config import Config
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.errors import StrataError


def test_without_a_manifest_there_is_no_artifact(things, tmp_path):
    made = things.draft(tmp_path)
    made.commit("0", Receipt([made.write("things", "0", things.schema, [things.table(0, 3)])], 3))
    assert made.root.find(made.spec) is None
    assert made.root.artifacts() == []
    with pytest.raises(StrataError, match="no finished things there; run the stage"):
        made.root.open(made.spec)


def test_published_artifact_reads_back_and_verifies(things, tmp_path):
    artifact = things.publish(tmp_path)
    assert artifact.read()["x"].to_pylist() == list(range(17))
    assert artifact.num_rows == 17 and artifact.stats == {"note": 1}
    found = Root(str(tmp_path)).find(Spec("things", 1, {}))
    assert found is not None and found.manifest == artifact.manifest
    artifact.verify()


class OnThisMachine(Config):
    """Its content is a file's, which no other machine has."""

    path: str

    def content(self):
        return {"text": Path(self.path).read_text()}


def test_a_spec_names_the_same_artifact_on_machines_that_lack_its_files(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    spec = Spec("things", 1, {"a": OnThisMachine(path=str(path))})
    name = spec.name
    travelled = pickle.dumps(spec)
    path.unlink()
    assert pickle.loads(travelled).name == spec.name == name  # noqa: S301


def test_another_setting_version_or_input_makes_another_artifact():
    specs = [
        Spec("things", 1, {"a": 1}),
        Spec("things", 1, {"a": 2}),
        Spec("things", 2, {"a": 1}),
        Spec("things", 1, {"a": 1}, {"pairs": Spec("pairs", 1, {})}),
        Spec("things", 1, {"a": 1}, {"pairs": Spec("pairs", 2, {})}),
        Spec("things", 1, {"a": 1}, {}, {"file": 5}),
    ]
    assert len({spec.fingerprint for spec in specs}) == len(specs)


def test_a_label_makes_no_other_artifact():
    labelled = Spec("things", 1, {"a": 1}, label="theirs")
    assert labelled.fingerprint == Spec("things", 1, {"a": 1}).fingerprint


@pytest.mark.parametrize("damage", [os.remove, lambda path: Path(path).write_bytes(b"PAR1")])
def test_a_damaged_part_is_named_with_the_remedy(things, tmp_path, damage):
    artifact = things.publish(tmp_path)
    damage(f"{artifact.path}/{artifact.parts()[1].path}")
    with pytest.raises(
        StrataError,
        match=r"things/1-\w+\.parquet: named in the manifest but missing or damaged.*again",
    ):
        artifact.read()
    with pytest.raises(StrataError, match=r"things/1-\w+\.parquet"):
        artifact.verify()


def test_whatever_byte_is_flipped_it_is_told_or_does_not_matter(things, tmp_path):
    """Item 14: page checksums, and a digest of the footer, which has none."""
    artifact = things.publish(tmp_path)
    expected = artifact.read()
    path = Path(artifact.path, artifact.parts()[0].path)
    data = path.read_bytes()
    num_told = 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            assert artifact.read().equals(expected)
        except StrataError as error:
            assert f"{path}: named in the manifest but missing or damaged (" in str(error)
            assert str(error).endswith(f"; delete {artifact.path} and run its stage again")
            num_told += 1
    assert num_told > 0.9 * len(data)  # the rest is statistics of pages, which nobody reads


@pytest.mark.parametrize("text", ["", '{"kind": "thi', "\xff", "[]", "{}", "5"])
def test_a_damaged_manifest_is_one_message(things, tmp_path, text):
    artifact = things.publish(tmp_path)
    path = Path(artifact.path, "manifest.json")
    path.write_bytes(text.encode("latin-1"))
    for look in (
        lambda: artifact.root.find(Spec("things", 1, {})),
        lambda: artifact.root.open(Spec("things", 1, {})),
        artifact.root.artifacts,
        lambda: things.draft(tmp_path).publish([]),
    ):
        with pytest.raises(
            StrataError, match=rf"^{path}: damaged.*; delete {artifact.path} and run its stage"
        ):
            look()


def test_slices_cover_the_table_in_order_whatever_their_size(things, tmp_path):
    artifact = things.publish(tmp_path, bounds=((0, 10), (10, 10), (10, 17)))
    for size in range(1, 20):
        pieces = artifact.slices(size)
        assert len({piece.id for piece in pieces}) == len(pieces)
        rows = [row for piece in pieces for row in artifact.read_slice(piece)["x"].to_pylist()]
        assert rows == list(range(17))
        assert all(piece.num_rows <= size for piece in pieces)


def test_blocks_cover_the_table_in_order_and_all_but_the_last_are_of_one_size(things, tmp_path):
    artifact = things.publish(tmp_path, bounds=((0, 10), (10, 10), (10, 17)))
    for size in range(1, 20):
        blocks = artifact.blocks(size)
        rows = [
            row
            for block in blocks
            for piece in block
            for row in artifact.read_slice(piece)["x"].to_pylist()
        ]
        assert rows == list(range(17))
        sizes = [sum(piece.num_rows for piece in block) for block in blocks]
        assert set(sizes[:-1]) <= {size} and 1 <= sizes[-1] <= size


def test_root_that_cannot_be_written_is_refused(things, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StrataError, match="cannot be written"):
        Root(str(tmp_path / "file" / "root")).check_writable()
    Root(str(tmp_path / "new")).check_writable()
    assert things.files(tmp_path / "new") == []


def test_other_file_systems_go_through_fsspec(things, tmp_path):
    root = Root("memory://workspace")
    made = Draft(root, Spec("things", 1, {}))
    part = made.write("things", "0", things.schema, [things.table(0, 3)])
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "a.txt").write_bytes(b"hello")
    artifact = made.publish([Receipt([part, *made.write_folder("extra", tmp_path / "extra")], 3)])
    assert artifact.read()["x"].to_pylist() == [0, 1, 2]
    assert not root.is_local
    assert (artifact.download("extra", tmp_path / "copy") / "a.txt").read_bytes() == b"hello"


def test_lineage_tells_what_is_gone(things, tmp_path):
    first = things.publish(tmp_path)
    gone = Spec("model", 1, {})
    inputs = {"things": Spec("things", 1, {}), "model.a": gone}
    second = Draft(first.root, Spec("other", 1, {}, inputs)).publish([])
    assert [(depth, name) for depth, name, _ in lineage(second)] == [
        (0, second.name),
        (1, first.name),
        (1, gone.name),
    ]
    assert (
        json.loads((Path(second.path) / "manifest.json").read_text())["inputs"]["things"]
        == first.name
    )
