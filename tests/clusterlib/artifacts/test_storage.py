"""Item 16: stores that fail for a moment are asked again; others are not."""

import errno
import pickle
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pyarrow.fs as pafs
import pytest

from clusterlib.artifacts import storage
from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.digests import contents
from clusterlib.artifacts.draft import Draft, Receipt
from pipelines.files import Location


class Faulty(storage.Patient):
    """A store each of whose operations fails as often as said, before or after it is done."""

    def __init__(self, num_faults, late=False, error=None):
        self.fs = pafs.LocalFileSystem()
        self.num_faults, self.late = num_faults, late
        self.error = error or OSError("AWS Error SLOW_DOWN during PutObject operation: slow")
        self.failed = {}

    def __reduce__(self):
        return Faulty, (self.num_faults, self.late, self.error)

    def _call(self, name, *arguments, **options):
        count = self.failed.get((name, str(arguments)), 0)
        if count == self.num_faults:
            return getattr(self.fs, name)(*arguments, **options)
        self.failed[name, str(arguments)] = count + 1
        if self.late and not name.startswith(("open", "get")):
            getattr(self.fs, name)(*arguments, **options)
        raise self.error


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Makes a root on a faulty store; nobody waits."""
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)

    def make(*arguments, **options):
        root = Root(str(tmp_path))
        store = pafs.PyFileSystem(Faulty(*arguments, **options))
        root.__dict__["_resolved"] = storage.patient(store), str(tmp_path)
        return root

    return make


@pytest.mark.parametrize("late", [False, True])
def test_an_artifact_is_made_though_every_operation_fails_twice(faulty, things, late, capsys):
    root = faulty(2, late=late)
    draft = Draft(root, Spec("things", 1, {}))
    receipts = []
    for number in range(2):
        part = draft.write("things", f"{number}", things.schema, [things.table(0, 3)])
        receipts.append(Receipt([part], 3))
        draft.commit(f"{number}", receipts[-1])
    assert draft.receipts() == {"0", "1"}
    made = draft.publish(receipts)
    made.verify()
    assert made.read().num_rows == 6
    assert things.files(made.path) == sorted(
        ["manifest.json", *(part.path for part in made.parts())]
    )
    said = capsys.readouterr().err
    assert "storage: move " in said and "SLOW_DOWN" in said
    assert "trying again in" in said and "2 of 4 times" in said


def test_a_store_that_stays_away_is_given_up_with_the_count(faulty, capsys):
    root = faulty(10**6)
    with pytest.raises(TimeoutError, match=r"get_file_info .*SLOW_DOWN.*; tried 5 times in \d+ s"):
        root.artifacts()
    assert capsys.readouterr().err.count("trying again") == 4


def test_waits_double_and_differ_from_driver_to_driver(faulty, monkeypatch):
    waits = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    random.seed(0)
    with pytest.raises(TimeoutError):
        faulty(10**6).artifacts()
    assert all(half / 2 <= wait <= half for wait, half in zip(waits, (1, 2, 4, 8), strict=True))
    assert len({wait / half for wait, half in zip(waits, (1, 2, 4, 8), strict=True)}) == 4


@pytest.mark.parametrize(
    "error",
    [PermissionError("no"), OSError(errno.ENOSPC, "full"), OSError("Parquet file is corrupt")],
)
def test_what_would_come_again_is_not_tried_again(faulty, error, capsys):
    with pytest.raises(type(error)):
        faulty(1, error=error).artifacts()
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        OSError(errno.ECONNREFUSED, "refused"),
        OSError(
            "When reading information for key 'k' in bucket 'b': AWS Error UNKNOWN (HTTP status "
            "503) during HeadObject operation: No response body."
        ),
        OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7"),
        OSError("google::cloud::Status(UNAVAILABLE: Service Unavailable)"),
    ],
)
def test_these_are_transient(error):
    assert storage.is_transient(error)


def test_of_many_who_create_a_file_one_does(tmp_path):
    fs, path = pafs.LocalFileSystem(), str(tmp_path / "folder" / "file")

    def create(number):
        try:
            return storage.create(fs, path, f"{number}".encode()) and number
        except FileExistsError:
            return None

    for _ in range(20):
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        with ThreadPoolExecutor(8) as drivers:
            (first,) = {number for number in drivers.map(create, range(1, 9)) if number}
        assert Path(path).read_text() == f"{first}"
        assert [found.name for found in Path(path).parent.iterdir()] == ["file"]


def test_stores_that_cannot_link_say_so_and_write_nothing(tmp_path, monkeypatch):
    memory = Root("memory://workspace").fs
    assert not storage.create(memory, "/workspace/file", b"")
    monkeypatch.setattr("os.link", Mock(side_effect=OSError(errno.EPERM, "as on FAT")))
    assert not storage.create(pafs.LocalFileSystem(), str(tmp_path / "file"), b"")
    assert not list(tmp_path.iterdir())


def test_s3_is_asked_again_in_the_midst_of_files_and_stays_patient_in_other_processes(
    s3, things, tmp_path
):
    """503 to single requests of reading and writing, inputs among them."""
    root = pickle.loads(pickle.dumps(Root(f"{s3.uri}/root")))  # noqa: S301
    fs = pickle.loads(pickle.dumps(root.fs))  # noqa: S301
    assert storage.bare(fs).type_name == "s3" and isinstance(fs.handler, storage.Patient)
    assert root.fs == fs
    s3.outages = 2
    with fs.open_output_stream(f"{root.path}/input.jsonl") as stream:
        stream.write(b'{"query": "q"}\n')
        s3.outages = 2
    source = Location(f"{s3.uri}/root/input.jsonl")
    s3.outages = 3
    assert [line for _, line in source.lines(None)] == ['{"query": "q"}']
    (info,) = source.files()
    s3.outages = 2
    assert contents(source.fs, [info]) == contents(storage.bare(source.fs), [info])
    draft = Draft(root, Spec("things", 1, {}))
    s3.outages = 2
    made = draft.publish([Receipt([draft.write("things", "0", things.schema, [])], 0)])
    s3.outages = 2
    assert made.read().num_rows == 0 and s3.outages == 0


def test_requests_to_s3_are_repeated_as_often_as_said_here(s3, monkeypatch):
    """By itself, pyarrow asks 31 times within six seconds."""
    monkeypatch.setattr(storage, "_CLIENT_TRIES", 2)
    fs = storage.bare(Root(s3.uri).fs)
    s3.num_requests, s3.outages = 0, 100
    with pytest.raises(OSError, match="HTTP status 503"):
        fs.get_file_info("bucket/a")
    assert s3.num_requests == 2
