"""The process of the command line, from the package's first import on: Ctrl-C, closed streams.

torch takes a second or more to import, so an early Ctrl-C comes while nothing has begun. This
module is imported before torch and needs little of the standard library: what it imports itself
can still be interrupted with a traceback.
"""

from __future__ import annotations

import _thread
import itertools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

CODE = 130
_PROG = "fedmap-sparse"

#: Names of the standard streams that were closed when the command started.
closed: set[str] = set()


def is_command() -> bool:
    """Whether this process is `fedmap-sparse` or `python -m fedmap_sparse`, not an importer."""
    if sys.argv and os.path.basename(sys.argv[0]).removesuffix(".exe") == _PROG:  # noqa: PTH119  # no pathlib yet
        return True
    words = sys.orig_argv
    return any(a == "-m" and b == "fedmap_sparse" for a, b in itertools.pairwise(words))


def again(argv: Sequence[str] | None = None) -> str:
    """The command of this process, or with these arguments, as a shell takes it."""
    return shlex.join([_PROG, *(sys.argv[1:] if argv is None else argv)])


def watch_imports() -> None:
    """Until `watch_run`, Ctrl-C ends the command at once with one line: nothing is written yet."""
    if is_command():
        _fill_closed_streams()
        if _interruptible():
            signal.signal(signal.SIGINT, _leave)
        _check_folder()


def _fill_closed_streams() -> None:
    """Fill the numbers of closed standard streams (`>&-`), so that no file of ours gets them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            closed.add(name)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  # for good


def _check_folder() -> None:
    """End the command where the current folder was removed: MKL would, with a line about itself."""
    try:
        os.getcwd()  # noqa: PTH109  # no pathlib yet
    except OSError as error:
        _end(f"the current folder cannot be read: {error.strerror}; start from another one", 2)


def watch_run() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, also where Python would print and lose it."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = _again_later


def watch_nothing() -> None:
    """The command has its result: a late Ctrl-C must not print a traceback over it."""
    if is_command() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C within takes effect at the end: for what must not be cut in two.

    An import is one: C extensions turn a KeyboardInterrupt into an ImportError.
    """
    if not _interruptible():
        yield
        return
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed:
            raise KeyboardInterrupt


def _interruptible() -> bool:
    # A shell starts background jobs with SIGINT ignored, and another program has its own handler:
    # both stay.
    here = threading.current_thread() is threading.main_thread()
    return here and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _leave(*_: object) -> None:
    _end(f"interrupted before anything began; start again with: {again()}", CODE)


def _end(text: str, code: int) -> None:
    """End the process at once, with one line."""
    try:
        os.write(2, f"{_PROG}: {text}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(code)


def _again_later(found: sys.UnraisableHookArgs) -> None:
    if isinstance(found.exc_value, KeyboardInterrupt):  # raised in a finalizer, say
        _thread.interrupt_main()
    else:
        sys.__unraisablehook__(found)
