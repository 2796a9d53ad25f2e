import functools
from pathlib import Path

import pyarrow as pa
import pytest

from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.errors import StrataError
from pipelines.tasks import Job, Task, Workers, make

SCHEMA = pa.schema([("x", pa.int64())])


def rows(count):
    return pa.table({"x": list(range(count))}, schema=SCHEMA)


class Plain:
    """Writes as many rows as its work says; odd work fails when told to."""

    def __init__(self, draft, failing=False):
        self.draft, self.failing = draft, failing

    def __call__(self, work):
        if self.failing and work % 2:
            raise StrataError(f"work {work} is odd")
        return Receipt([self.draft.write("things", f"{work}", SCHEMA, [rows(work)])], work)


class Overtaken(Plain):
    """While it writes its last part, another driver publishes the artifact."""

    def __call__(self, work):
        if work < 3:
            return super().__call__(work)

        def groups():
            yield rows(work)
            other = Draft(self.draft.root, self.draft.spec)
            other.publish(
                [Receipt([other.write("things", "0", SCHEMA, [rows(6)])], 6)], {"by": "other"}
            )

        return Receipt([self.draft.write("things", f"{work}", SCHEMA, groups())], work)


@pytest.fixture
def draft(ray_running, tmp_path):
    return Draft(Root(str(tmp_path)), Spec("things", 1, {}))


def run(draft, worker):
    tasks = [Task(f"{work}", work, f"file {work}") for work in (1, 2, 3)]
    publish = functools.partial(draft.publish, stats={"by": "us"})
    job = Job(draft, tasks, functools.partial(worker, draft), publish)
    (made,) = make("test", [job], Workers(max_workers=1))
    return made


def test_parts_are_in_task_order_and_a_failed_task_is_done_again(draft):
    with pytest.raises(StrataError, match="is odd"):
        run(draft, functools.partial(Plain, failing=True))
    assert draft.root.find(draft.spec) is None
    made = run(draft, Plain)
    assert [part.num_rows for part in made.parts()] == [1, 2, 3] and made.stats["by"] == "us"


def test_a_driver_that_was_overtaken_returns_what_the_other_made(draft):
    made = run(draft, Overtaken)
    made.verify()
    files = [path for path in Path(made.path).rglob("*") if path.is_file()]
    assert len(files) == 2  # the other's part and manifest: late receipts are swept
    assert made.stats["by"] == "other" and made.read()["x"].to_pylist() == list(range(6))


def test_a_driver_that_is_overtaken_while_it_publishes_returns_what_the_other_made(draft):
    def publish(receipts):
        other = Draft(draft.root, draft.spec)

        def groups():
            yield rows(6)
            other.publish(
                [Receipt([other.write("things", "0", SCHEMA, [rows(6)])], 6)], {"by": "other"}
            )

        extra = draft.write("extra", "0", SCHEMA, groups())
        return draft.publish([*receipts, Receipt([extra])], {"by": "us"})

    job = Job(draft, [Task("6", 6, "file 6")], functools.partial(Plain, draft), publish)
    (made,) = make("test", [job], Workers(max_workers=1))
    assert made.stats["by"] == "other"
    made.verify()


def test_jobs_share_one_pool_and_each_is_published_by_itself(ray_running, tmp_path):
    drafts = [Draft(Root(str(tmp_path)), Spec("things", 1, {"n": n}, label=f"{n}")) for n in (1, 2)]

    def job(draft, work, worker):
        tasks = [Task(f"{number}", number, f"file {number}") for number in work]
        return Job(draft, tasks, functools.partial(worker, draft), draft.publish)

    failing = functools.partial(Plain, failing=True)
    with pytest.raises(StrataError, match="work 3 is odd"):
        make("test", [job(drafts[0], (2, 4), Plain), job(drafts[1], (3,), failing)], Workers(1, 1))
    finished = drafts[0].root.find(drafts[0].spec)
    assert finished.num_rows == 6 and drafts[1].root.find(drafts[1].spec) is None
    made = make("test", [job(drafts[0], (2, 4), Plain), job(drafts[1], (3,), Plain)], Workers(1, 1))
    assert [artifact.num_rows for artifact in made] == [6, 3]
    assert made[0].manifest["created_utc"] == finished.manifest["created_utc"]
