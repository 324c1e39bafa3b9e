"""Launching a kernel that is compiled already, without asking Triton again.

Triton works out at each launch what its arguments mean for the code, and whether the constants
that the kernel read have changed: 8 to 14 us of Python on the machine of the tests, several times
that on a slow host, where a selection's launches made its caller wait longer than the device
needed. Here a kernel is found by a key at least as fine as Triton's own. What has no
entry goes through Triton, and so does everything where the key might not do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction

#: Compiled kernels by key. Numbers are part of it, so it is emptied when it has grown.
_compiled: dict[tuple[Any, ...], Any] = {}
_MOST = 1024
# The versions that tests/gpu_free/test_launch.py has run with: what a launch depends on is there.
# On an AMD device Triton looks at a tensor's size too.
_KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.")) and torch.version.hip is None
_run = JITFunction.run
#: Arguments that are no tensors. (`isinstance` of a Tensor takes 0.1 us to say no.)
_PLAIN = frozenset((int, type(None)))


def _key(
    kernel: Any, device: int, num_warps: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """A tensor counts by its type and alignment, all else by its value."""
    return (
        kernel.fn,
        device,
        num_warps,
        knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
        *[a if type(a) in _PLAIN else (a.dtype, a.data_ptr() & 15) for a in arguments],
        *constants,
        *constants.values(),
    )


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any
) -> None:
    """`kernel[grid](*arguments, **constants)` on the current device and stream.

    `constants` are the kernel's last parameters, in its order. Products and sums are never
    contracted.
    """
    runtime = knobs.runtime
    # Kernels that somebody interprets, watches or instruments are Triton's to launch.
    direct = (
        _KNOWN
        and type(kernel).run is _run
        and not kernel.pre_run_hooks
        and not runtime.launch_enter_hook.calls
        and not runtime.launch_exit_hook.calls
        and runtime.add_stages_inspection_hook is None
    )
    if direct:
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = _key(kernel, device, num_warps, arguments, constants)
        compiled = _compiled.get(key)
        if compiled is not None:
            x, y, z = (*grid, 1, 1)[:3]
            compiled.run(
                x, y, z, driver.get_current_stream(device), compiled.function,
                compiled.packed_metadata, None, None, None, *arguments, *constants.values(),
            )  # fmt: skip
            return
    compiled = kernel[grid](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)
    if direct:
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = compiled


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's takes 1.9 us, as it serves constants of kernels too.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
