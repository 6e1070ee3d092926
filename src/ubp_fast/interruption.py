"""Ctrl-C and SIGTERM: a command ends within seconds, with the exit code that shells expect and one sentence.

A signal handler of Python runs between two instructions of the interpreter, so compiled code keeps it waiting. A thread
that the signal wakes at once ends the process when that takes longer than `GRACE_S`, or when a second signal comes.
Both are safe: outputs appear under their name when they are complete.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

GRACE_S = 3.0
SENTENCE = "the same command continues from here"
_saying = threading.Lock()  # whoever ends the process waits until the sentence stands there whole
_raised = threading.Event()
_said = threading.Event()
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Interrupted(BaseException):
    """A signal asks the work to end; no `KeyboardInterrupt`, which libraries catch and turn into something else.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_interruptibly(work: Callable[[], int]) -> int:
    """The exit code of `work()`; 130 after Ctrl-C and 143 after SIGTERM, which are said on stderr.

    Inside of another call, or outside the main thread, `work()` alone: signals belong to the outermost. A signal that a
    shell tells its background jobs to ignore stays ignored.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or any(signal.getsignal(number) is _raise for number in _WORDS):
        return work()
    _raised.clear()
    _said.clear()
    heeded = [number for number in _WORDS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _raise) for number in heeded}
    read, write = os.pipe()
    os.set_blocking(write, False)
    woken_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(read,), daemon=True)
    watch.start()
    try:
        return work()
    except Interrupted as stop:
        _say(stop.number)
        return 128 + stop.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken_before)
        os.close(write)  # ends the thread
        watch.join()
        os.close(read)


def _raise(number: int, frame: FrameType | None) -> None:
    """Raises once: what ends the work is not cut off by a second signal, with which `_watch` ends the process."""
    if not _raised.is_set():
        _raised.set()
        raise Interrupted(number)


def _watch(read: int) -> None:
    """Ends the process when it does not end by itself."""
    first, deadline = 0, float("inf")
    while True:
        left = None if first == 0 else max(deadline - time.monotonic(), 0.0)
        ready, _, _ = select.select([read], [], [], left)
        if not ready:
            _die(first)
        arrived = os.read(read, 64)
        if not arrived:
            return
        for number in arrived:
            if number not in _WORDS:
                continue
            if first:
                _die(first)
            first, deadline = number, time.monotonic() + GRACE_S


def _die(number: int) -> None:
    _say(number)
    os._exit(128 + number)


def _say(number: int) -> None:
    with _saying:
        if not _said.is_set():
            _said.set()
            print(f"{_WORDS[signal.Signals(number)]}; {SENTENCE}", file=sys.stderr, flush=True)
