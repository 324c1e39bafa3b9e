"""Memory that a call touches for the first time, counted as page faults in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux does")

SCRIPT = """
import ctypes
import resource
import sys
from threading import Thread
import torch
from fedmap_sparse._backends import native
sys.path[:0] = [{tests!r}, {tests!r} + "/ops"]
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is one page
torch.set_num_threads(2)
{setup}
def call():
    {call}
warm = torch.ones(1 << 20)
native.stream_read(warm, 2)  # the workers run
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = Thread(target=call)  # a new one has no scratch from calls before
thread.start()
thread.join()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize())
"""


def touched_bytes(setup: str, call: str) -> int:
    """What `call` touches anew, after the lines of `setup`; both see torch and `native`."""
    script = SCRIPT.format(setup=setup, call=call, tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        # Each large block is mapped anew, so that none is found still resident.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
