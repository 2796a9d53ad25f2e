import hashlib
import os
import shutil
import threading

import pytest

from clusterlib.artifacts import digests

MIB = 2**20


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """Paths of the files that were read; nothing is known from before, and files settle at once."""
    found = []
    whole = hashlib.file_digest
    monkeypatch.setattr(digests, "_FOLDER", tmp_path / "home" / "digests")
    monkeypatch.setattr(digests, "_SETTLED_NS", -1)
    monkeypatch.setattr(digests, "_known", {})
    monkeypatch.setattr(
        hashlib,
        "file_digest",
        lambda stream, name: found.append(stream.name) or whole(stream, name),
    )
    return found


@pytest.fixture
def another_command(monkeypatch):
    """Forgets what this process knows."""
    return lambda: monkeypatch.setattr(digests, "_known", {})


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_read_once_and_not_by_every_command(tmp_path, reads, another_command):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(os.urandom(2 * MIB))
    small.write_bytes(b"small")
    for _ in range(2):
        assert digests.of_files([large, small]) == [sha256(large), sha256(small)]
    assert sorted(reads) == [str(large), str(small)]
    another_command()
    assert digests.of_files([large, small]) == [sha256(large), sha256(small)]
    assert reads[2:] == [str(small)]  # as soon read as looked up


def test_a_touched_file_has_the_same_digest(tmp_path, reads):
    path = tmp_path / "a"
    path.write_bytes(b"a" * MIB)
    before = digests.of_file(path)
    os.utime(path, (1, 1))
    assert digests.of_file(path) == before


def overwrite(path, data):
    path.write_bytes(data)


def exchange(path, data):
    """As `mv` does, and rsync."""
    path.with_suffix(".new").write_bytes(data)
    shutil.copystat(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("edit", [overwrite, exchange])
@pytest.mark.parametrize("remembered", [True, False])
def test_an_edit_of_equal_size_is_seen_though_its_time_is_put_back(
    tmp_path, reads, another_command, edit, remembered
):
    path = tmp_path / "a"
    path.write_bytes(b"a" * MIB)
    before = path.stat()
    digests.of_file(path)
    edit(path, b"b" * MIB)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    if not remembered:
        another_command()
    assert path.stat().st_mtime_ns == before.st_mtime_ns and digests.of_file(path) == sha256(path)


def test_a_file_written_just_now_is_read_again(tmp_path, reads, monkeypatch):
    """Two writes may fall into one tick of the file system's clock: git calls such a file racily
    clean.
    """
    monkeypatch.setattr(digests, "_SETTLED_NS", 2 * 10**9)
    path = tmp_path / "a"
    path.write_bytes(b"a" * MIB)
    digests.of_file(path)
    stat = path.stat()
    path.write_bytes(b"b" * MIB)
    monkeypatch.setattr(
        digests, "_identity", lambda found: digests._Identity(MIB, stat.st_mtime_ns, 0, 0)
    )
    assert digests.of_file(path) == sha256(path)
    assert len(reads) == 2 and not digests._FOLDER.exists()


@pytest.mark.parametrize("torn", ["", "12", "not a record at all", "\x00" * 80])
def test_a_torn_record_is_as_good_as_none(tmp_path, reads, another_command, torn):
    path = tmp_path / "a"
    path.write_bytes(b"a" * MIB)
    digests.of_file(path)
    (record,) = digests._FOLDER.iterdir()
    record.write_text(torn)
    another_command()
    assert digests.of_file(path) == sha256(path) and len(reads) == 2


def test_there_is_one_record_of_a_path_whatever_was_there(tmp_path, reads):
    path = tmp_path / "a"
    for fill in (b"a", b"b", b"c"):
        path.write_bytes(fill * MIB)
        digests.of_file(path)
    assert len(list(digests._FOLDER.iterdir())) == 1


def test_commands_write_records_at_the_same_time(tmp_path, reads):
    path = tmp_path / "a"
    path.write_bytes(b"a" * MIB)
    found = []

    def command():
        for _ in range(20):
            digests._known.clear()
            found.append(digests.of_file(path))

    threads = [threading.Thread(target=command) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [sha256(path)] * 80 and len(list(digests._FOLDER.iterdir())) == 1


def test_a_home_that_cannot_be_written_costs_time_and_nothing_else(tmp_path, reads, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(digests, "_FOLDER", tmp_path / "file" / "digests")
    path = tmp_path / "a"
    path.write_bytes(b"a" * MIB)
    assert digests.of_file(path) == sha256(path)
