"""How a command ends when it is told to: by SIGINT, by SIGTERM, or because nobody reads its output any more."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

PATIENCE = 10.0  # seconds that a command has to end in order; then it is ended
BROKEN_PIPE = 141  # 128 + SIGPIPE


@contextmanager
def ending(line: str) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end the program with one line on stderr and exit status 130 or 143.

    The first signal raises KeyboardInterrupt, so that progress bars, stores and clusters are closed in order. A second
    one, or one that comes during an import (which cannot be relied upon to pass an exception on), ends at once.

    Args:
        line: how to go on.
    """
    end = _End(line)
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, end.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        if end.number:
            end.in_order()
        end.by_exception()
    except BrokenPipeError:
        end_quietly()
    except BaseException:
        if end.number:  # what an interrupt was turned into on its way
            end.in_order()
        raise
    else:
        if end.number:  # somebody swallowed it
            end.in_order()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_quietly() -> NoReturn:
    """End where nobody reads the output: no words, and none from the interpreter that closes it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(BROKEN_PIPE)


class _End:
    def __init__(self, line: str) -> None:
        self.line, self.number, self.told = line, 0, False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number or _importing(frame):
            self.now(self.number or number)
        self.number = number
        sys.unraisablehook = lambda unraisable: None  # an interrupt in a destructor is no news
        timer = threading.Timer(PATIENCE, self.now, (number,))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    def by_exception(self) -> NoReturn:
        """A KeyboardInterrupt that no signal of ours made."""
        print(self.line, file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT)

    def in_order(self) -> NoReturn:
        """End after the command has let go: workers first, which may be in a task, then what runs at exit."""
        _kill(process for process in _descendants(os.getpid()) if not _tracks_resources(process))
        self._tell()
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nothing after the line
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        self.now(self.number)

    def now(self, number: int) -> NoReturn:
        """End this process and those that it started."""
        _kill(_descendants(os.getpid()))
        with contextlib.suppress(Exception):  # a handler may stand inside a write
            sys.stdout.flush()
        self._tell()
        os._exit(128 + number)

    def _tell(self) -> None:
        if self.told:
            return
        self.told = True
        with contextlib.suppress(OSError):
            if sys.__stdout__ is not None and sys.__stdout__.isatty():
                os.write(sys.__stdout__.fileno(), b"\x1b[?25h")  # progress bars hide the cursor
            os.write(2, f"{self.line}\n".encode())


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _kill(processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(OSError):
            os.kill(process, getattr(signal, "SIGKILL", signal.SIGTERM))


def _descendants(process: int) -> list[int]:
    """Processes below this one, where the system tells."""
    children = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += [int(child) for child in path.read_text().split()]
    return [deeper for child in children for deeper in _descendants(child)] + children


def _tracks_resources(process: int) -> bool:
    """Whether a process cleans up after workers; it ends by itself."""
    with contextlib.suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{process}/cmdline").read_bytes()
    return False
