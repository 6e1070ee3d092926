"""Tasks that fill folders, one after the other in this process or side by side on a Ray cluster.

A task is a function of a folder. Its folder appears by a rename when it is complete, with `manifest.json`, sizes and
digests of its files: a task whose folder is there is done, one that is tried twice at once changes nothing, and a
driver that is killed goes on where it stood.
"""

from __future__ import annotations

import secrets
import shutil
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ubp_fast.events.schema import UserError
from ubp_fast.files import file_digest, load_json, publish_first, remove_at_once, write_json
from ubp_fast.models.training import give_back_memory

MANIFEST_FILE = "manifest.json"
# A task is lost so often at most before the run gives up.
MOST_LOSSES = 5
# A task that takes so many times as long as the others, and this long, is started a second time.
SLOW, SLOW_S = 3.0, 30.0
POLL_S = 0.5


class Task(NamedTuple):
    """What fills a folder.

    Attributes:
        folder: appears when it is complete.
        work: fills an empty folder; goes to other machines by pickle.
    """

    folder: Path
    work: Callable[[Path], None]


class Engine(ABC):
    """Where tasks run."""

    def run(self, stage: str, tasks: Sequence[Task], done: Callable[[], None]) -> None:
        """Does all tasks that are not done yet.

        Args:
            stage: what they are called.
            tasks: in any order.
            done: called whenever one is finished.

        Raises:
            UserError: a task that was lost too often. Errors of a task are raised as they are.
        """
        missing = []
        for task in tasks:
            if is_whole(task.folder):
                done()
            else:
                remove_at_once(task.folder)
                task.folder.parent.mkdir(parents=True, exist_ok=True)
                for left in task.folder.parent.glob(f".{task.folder.name}.*.partial"):  # by a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
                missing.append(task)
        self._run(stage, missing, done)

    @abstractmethod
    def _run(self, stage: str, tasks: Sequence[Task], done: Callable[[], None]) -> None:
        """Does all tasks."""


class LocalEngine(Engine):
    """One task after the other in this process."""

    def _run(self, stage: str, tasks: Sequence[Task], done: Callable[[], None]) -> None:
        give_back_memory()  # of what this process has fitted
        for task in tasks:
            _do(task)
            done()
        give_back_memory()


class RayEngine(Engine):
    """Ray tasks, one for each, on a cluster whose machines see the same folders.

    Args:
        address: of the cluster, see `ray.init`; "auto": the one of this machine; None: one is started here.
        threads: of a task; as many CPUs are asked for.
        tell: called with a sentence for whatever is done again.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str | None, threads: int, tell: Callable[[str], None]) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(
                f"run: compute.engine=ray needs the extra 'ray' ({error}); pip install 'ubp_fast[ray]', or leave"
                " compute.engine=local"
            ) from error
        self._ray: Any = ray
        self._threads, self._tell = threads, tell
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, ValueError) as error:
                raise UserError(
                    f"run: compute.address must be that of a Ray cluster, got '{address}' ({error}); start one with"
                    " 'ray start --head', or compute.address=null starts one here"
                ) from error

    def _run(self, stage: str, tasks: Sequence[Task], done: Callable[[], None]) -> None:
        ray = self._ray
        # What is lost is started again here, where it can be told.
        remote = ray.remote(num_cpus=self._threads, max_retries=0)(_do_elsewhere)
        running: dict[Any, tuple[Task, float]] = {}
        losses = dict.fromkeys((task.folder for task in tasks), 0)
        left, took = {task.folder for task in tasks}, []

        def start(task: Task) -> None:
            name = f"{stage} {task.folder.name}"
            running[remote.options(name=name).remote(task, self._threads)] = task, time.monotonic()

        for task in tasks:
            start(task)
        while left:
            finished, _ = ray.wait(list(running), timeout=POLL_S)
            for reference in finished:
                task, started_s = running.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    if task.folder in left:
                        raise error.as_instanceof_cause() from None
                except ray.exceptions.RayError as error:
                    if task.folder in left:
                        self._again(stage, task, losses, error)
                        start(task)
                else:
                    if task.folder in left:
                        took.append(time.monotonic() - started_s)
                        left.discard(task.folder)
                        done()
            self._help_slow_ones(stage, running, left, took, start)
        for reference in running:  # the slower ones of two
            ray.cancel(reference, force=True)

    def _again(self, stage: str, task: Task, losses: dict[Path, int], error: Exception) -> None:
        losses[task.folder] += 1
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if losses[task.folder] > MOST_LOSSES:
            raise UserError(
                f"{stage}: task {task.folder.name} must survive, got lost {losses[task.folder]} times ({reason}); look"
                " for too little memory (more compute.shards make tasks smaller), then give the same command again"
            ) from error
        self._tell(f"{stage}: task {task.folder.name} was lost ({reason}) and is done again")

    def _help_slow_ones(
        self,
        stage: str,
        running: dict[Any, tuple[Task, float]],
        left: set[Path],
        took: list[float],
        start: Callable[[Task], None],
    ) -> None:
        """Starts what takes long a second time once half of all is done; whoever is first wins."""
        if len(took) < len(left) or not took:
            return
        limit_s = max(SLOW_S, SLOW * statistics.median(took))
        often = [task.folder for task, _ in running.values()]
        for task, started_s in list(running.values()):
            if task.folder in left and often.count(task.folder) == 1 and time.monotonic() - started_s > limit_s:
                self._tell(f"{stage}: task {task.folder.name} is slow and is started a second time")
                start(task)


def is_whole(folder: Path) -> bool:
    """Whether a task has left this folder, and nothing of it was changed since."""
    try:
        files = load_json(folder / MANIFEST_FILE)
        return all(_facts(folder / name) == facts for name, facts in files.items())
    except (OSError, ValueError):
        return False


def _facts(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "blake2b": file_digest(path)}


def _do(task: Task) -> None:
    if task.folder.exists():
        return
    partial = task.folder.with_name(f".{task.folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        task.work(partial)
        files = {str(path.relative_to(partial)): _facts(path) for path in sorted(partial.rglob("*")) if path.is_file()}
        write_json(partial / MANIFEST_FILE, files)
        publish_first(partial, task.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _do_elsewhere(task: Task, threads: int) -> None:
    torch.set_num_threads(threads)
    _do(task)
