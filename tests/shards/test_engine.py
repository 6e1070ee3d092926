"""Tasks that fill folders: what is whole stays, what is lost or damaged is done again, here and on Ray."""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import CLOSED_FORMS, contents, few_rows, run_tiny

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.shards.engine import LocalEngine, RayEngine, Task, is_whole


def write(number: int, folder: Path) -> None:
    (folder / "inside").mkdir()
    (folder / "inside" / "number.txt").write_text(str(number))


def refuse(folder: Path) -> None:
    raise DataError("table: rows must be there, got none")


def tasks_in(folder: Path, number: int) -> list[Task]:
    return [Task(folder / f"{place:05d}", partial(write, place)) for place in range(number)]


def test_what_is_whole_is_not_done_again(tmp_path: Path) -> None:
    tasks, seen = tasks_in(tmp_path, 3), []
    LocalEngine().run("write", tasks, lambda: seen.append(1))
    assert len(seen) == 3 and all(is_whole(task.folder) for task in tasks)
    times = [(task.folder / "inside" / "number.txt").stat().st_mtime_ns for task in tasks]
    (tasks[1].folder / "inside" / "number.txt").write_text("7")  # as long as before
    (tmp_path / ".00002.1a2b3c4d.partial").mkdir()
    (tmp_path / ".00002.1a2b3c4d.partial" / "half").touch()
    (tasks[2].folder / "manifest.json").unlink()
    LocalEngine().run("write", tasks, lambda: seen.append(1))
    assert len(seen) == 6
    assert [(task.folder / "inside" / "number.txt").read_text() for task in tasks] == ["0", "1", "2"]
    assert (tasks[0].folder / "inside" / "number.txt").stat().st_mtime_ns == times[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000", "00001", "00002"]


def test_a_task_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows must be there"):
        LocalEngine().run("refuse", [Task(tmp_path / "0", refuse)], lambda: None)
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks the C library of Linux to give memory back")
def test_a_local_run_gives_back_what_was_freed_before(tmp_path: Path) -> None:
    def own_bytes() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))

    arrays = [np.ones(12_000) for _ in range(2_000)]  # of the heap: too small for a mapping of their own
    last, full_bytes = arrays.pop(), own_bytes()
    del arrays
    LocalEngine().run("write", tasks_in(tmp_path, 1), lambda: None)
    assert own_bytes() < full_bytes - 150_000_000
    assert last.all()


def test_ray_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'ubp_fast\[ray\]'"):
        RayEngine(None, 1, print)


class ThreadsAsRay:
    """As much of Ray as the engine asks for, with threads for workers."""

    exceptions = SimpleNamespace(RayTaskError=DataError, RayError=ConnectionError)

    def __init__(self) -> None:
        self.workers, self.names = ThreadPoolExecutor(8), list[str]()

    def is_initialized(self) -> bool:
        return True

    def remote(self, **_: object) -> Any:
        def named(function: Any, name: str) -> Any:
            self.names.append(name)
            return SimpleNamespace(remote=partial(self.workers.submit, function))

        return lambda function: SimpleNamespace(options=partial(named, function))

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        done, left = wait(references, timeout, FIRST_COMPLETED)
        return list(done), list(left)

    def get(self, reference: Any) -> None:
        reference.result()

    def cancel(self, reference: Any, force: bool) -> None:
        assert force


def test_a_slow_task_is_started_twice_at_most_and_the_first_result_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, said, seen, end, calls = ThreadsAsRay(), list[str](), list[int](), Event(), list[int]()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("ubp_fast.shards.engine.SLOW_S", 0.2)
    monkeypatch.setattr("ubp_fast.shards.engine.POLL_S", 0.02)

    def slow_at_first(folder: Path) -> None:
        calls.append(1)
        attempt = len(calls)
        end.wait(30 if attempt == 1 else 0.5)  # the second: for several looks at what runs
        (folder / "attempt").write_text(str(attempt))

    tasks = [*tasks_in(tmp_path, 4), Task(tmp_path / "slow", slow_at_first)]
    try:
        # Threads of this process: the engine sets how many torch has.
        RayEngine(None, torch.get_num_threads(), said.append).run("write", tasks, lambda: seen.append(1))
        assert said == ["write: task slow is slow and is started a second time"]
        assert ray.names.count("write slow") == len(calls) == 2 and len(seen) == 5
    finally:
        end.set()
        ray.workers.shutdown()
    assert (tmp_path / "slow" / "attempt").read_text() == "2" and all(is_whole(task.folder) for task in tasks)
    assert not [*tmp_path.glob(".*.partial")], "the slower one leaves nothing"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three machines of one CPU each."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # of a machine with other work; read by the import
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(2):
        found.add_node(**node)
    environment = {"env_vars": {"PYTHONPATH": paths}, "worker_process_setup_hook": few_rows}
    ray.init(address=found.address, log_to_driver=False, runtime_env=environment)
    yield found
    ray.shutdown()
    found.shutdown()


def end_at_once(other: Path, folder: Path) -> None:
    """The first process ends as if its machine had."""
    if not (other / "ended").exists():
        (other / "ended").touch()
        os._exit(1)
    (folder / "done").touch()


@pytest.mark.slow
def test_ray_does_what_was_lost_again(cluster: Any, tmp_path: Path) -> None:
    said: list[str] = []
    engine, other = RayEngine(None, 1, said.append), tmp_path / "other"
    other.mkdir()
    lost = Task(tmp_path / "tasks" / "lost", partial(end_at_once, other))
    tasks, seen = [*tasks_in(tmp_path / "tasks", 4), lost], []
    engine.run("write", tasks, lambda: seen.append(1))
    assert len(seen) == 5 and all(is_whole(task.folder) for task in tasks)
    assert len(said) == 1 and said[0].startswith("write: task lost was lost (") and said[0].endswith("is done again")
    with pytest.raises(DataError, match="rows must be there"):
        engine.run("refuse", [Task(tmp_path / "refused", refuse)], lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 8])
def test_shards_on_a_cluster_give_the_bytes_of_one_pass(
    number: int, cluster: Any, one_pass: Path, tmp_path: Path
) -> None:
    code, run, said = run_tiny(tmp_path, *CLOSED_FORMS, "compute.engine=ray", f"compute.shards={number}")
    assert code == 0, said
    for folder in ("profiles", "model"):
        assert contents(run / folder) == contents(one_pass / folder)


# Of machines that start, die or get a task, on a machine that has other work.
PATIENCE_S = 300


def until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end_s, f"nothing came of it in {PATIENCE_S} s"
        time.sleep(0.1)


def held(marks: Path, victims: list[str], work: Callable[[Path], None], folder: Path) -> None:
    """On a machine that is to die a task says that it has begun and waits for that; elsewhere it waits for all such."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    if node in victims:
        (marks / node).touch()
        time.sleep(PATIENCE_S)
        raise AssertionError("the machine has not died")
    until(lambda: all((marks / victim).exists() for victim in victims))
    work(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_machines_die_and_every_stage_has_the_same_bytes(
    cluster: Any, one_pass: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of two machines beside the driver's dies in every stage while it has a task, in one stage both."""
    import ray

    draw, stages, alone = random.Random(27), list[str](), RayEngine._run
    twice, killed = draw.randrange(9), list[str]()

    def living() -> list[Any]:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sorted((node for node in cluster.worker_nodes if node.node_id in alive), key=lambda node: node.node_id)

    def run(engine: RayEngine, stage: str, tasks: Sequence[Task], done: Callable[[], None]) -> None:
        number = 2 if len(stages) == twice else 1
        stages.append(stage)
        until(lambda: len(living()) == 2)
        nodes = draw.sample(living(), number)
        victims, marks = [node.node_id for node in nodes], tmp_path / "marks" / stage
        marks.mkdir(parents=True)

        def kill() -> None:
            for node in nodes:
                until((marks / node.node_id).exists)
                cluster.remove_node(node, allow_graceful=False)
                killed.append(stage)

        killer = Thread(target=kill)
        killer.start()
        alone(engine, stage, [Task(task.folder, partial(held, marks, victims, task.work)) for task in tasks], done)
        killer.join()
        for _ in nodes:
            cluster.add_node(wait=False, num_cpus=1, object_store_memory=100 << 20)

    monkeypatch.setattr(RayEngine, "_run", run)
    code, found, said = run_tiny(tmp_path / "runs", *CLOSED_FORMS, "compute.engine=ray", "compute.shards=8")
    assert code == 0, said
    assert len({*stages}) == 9 and len(killed) == 10
    again = [line for line in capfd.readouterr().err.splitlines() if line.endswith("and is done again")]
    print("\n".join(again))
    for stage in stages:
        assert sum(line.startswith(f"{stage}: task ") for line in again) >= killed.count(stage), stage
    for folder in ("profiles", "model"):
        assert contents(found / folder) == contents(one_pass / folder)
