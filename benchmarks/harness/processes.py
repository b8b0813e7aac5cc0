"""Child processes that prepare at the same time and measure one after the other.

Tracing holds Python's lock and compiling takes a core, so a long table is prepared by many processes; and a kernel that
never ends then costs one process its time, not the table. A child calls `wait_for_turn` between the two.
"""

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

_READY = "\x01ready"
_GO = "go"


def wait_for_turn() -> None:
    """In a child: everything is prepared; returns when the others are too and no other one measures."""
    print(_READY, flush=True)
    if sys.stdin.readline().strip() != _GO:
        sys.exit("the parent process ended")


class _Child:
    def __init__(self, command: Sequence[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def relay(self, deadline: float, on_line: Callable[[str], None]) -> str:
        """Pass lines on until the child is 'ready', has 'ended', or is 'late' and killed."""
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.process.kill()
                return "late"
            if line is None:
                self.process.wait()
                return "ended"
            if line == _READY:
                return "ready"
            on_line(line)

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(_GO + "\n")
        self.process.stdin.flush()


def run_in_turn(
    commands: Sequence[Sequence[str]],
    on_line: Callable[[int, str], None],
    *,
    preparing_seconds: float,
    measuring_seconds: float,
    total_seconds: float = float("inf"),
) -> list[bool]:
    """Run all commands at once up to `wait_for_turn`, then each to its end; which of them ended by themselves.

    Args:
      commands: argument lists.
      on_line: told the number of a command and a line that it printed.
      preparing_seconds: for all of them together; whoever is not ready then is killed.
      measuring_seconds: for each; it is killed then.
      total_seconds: for everything; whose turn comes later is killed.
    """
    end = time.monotonic() + total_seconds
    children = [_Child(command) for command in commands]
    deadline = time.monotonic() + preparing_seconds
    states = [child.relay(deadline, lambda line, i=i: on_line(i, line)) for i, child in enumerate(children)]
    for i, child in enumerate(children):
        if states[i] == "ready" and time.monotonic() > end:
            states[i] = "late"
            child.process.kill()
        if states[i] == "ready":
            child.go()
            deadline = min(end, time.monotonic() + measuring_seconds)
            states[i] = child.relay(deadline, lambda line, i=i: on_line(i, line))
        child.end()
    return [state == "ended" and child.process.returncode == 0 for state, child in zip(states, children, strict=True)]
