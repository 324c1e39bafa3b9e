"""Launching a kernel that is compiled already, without asking Triton again.

Triton works out at each launch what its arguments mean for the code, and whether the constants
that the kernel read have changed: 8 to 14 us of Python on the machine of the tests, several times
that on a slow host, where a selection's launches made its caller wait longer than the device
needed. Here a kernel is found by a key that is at least as fine as Triton's. What has no entry goes
through Triton, and so does everything where the key might not do.

What depends on the kind of GPU stands here too: AMD devices always launch through Triton, which
looks at a tensor's size there, and know no limit of registers. Their warps have 64 lanes. No kernel
counts on 32: shapes in `_tuning` of one warp are chosen for 32 and are correct with any number.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction

#: Compiled kernels by key. Constants are part of it, so it is emptied when it has grown.
_compiled: dict[tuple[Any, ...], Any] = {}
_MOST = 1024
_HIP = torch.version.hip is not None
# The versions that tests/gpu_free/test_launch.py has run with: what a launch depends on is there.
_KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.")) and not _HIP
_run = JITFunction.run


#: Of each kernel, which parameters Triton looks at no closer than at their width.
_loose: dict[Any, tuple[bool, ...]] = {}


def _kind(argument: Any, loose: bool) -> Any:
    """What of an argument decides which code runs.

    A tensor counts by its type and alignment. An integer that no kernel is specialised on counts by
    its width: by its value, a new number of survivors in each round would be a new entry. Any other
    counts by its value.
    """
    if type(argument) is int:
        if not loose:
            return argument
        if -0x80000000 <= argument <= 0x7FFFFFFF:
            return "i32"
        return "i64" if argument <= 0x7FFFFFFFFFFFFFFF else "u64"
    return None if argument is None else (argument.dtype, argument.data_ptr() & 15)


def _key(
    kernel: Any, device: int, options: tuple[Any, ...], arguments: Any, constants: dict[str, Any]
) -> tuple[Any, ...]:
    """At least as fine as Triton's own; `options` are whatever else a compilation depends on."""
    loose = _loose.get(kernel.fn)
    if loose is None:
        loose = _loose[kernel.fn] = tuple(p.do_not_specialize for p in kernel.params)
    return (
        kernel.fn,
        device,
        options,
        knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
        *map(_kind, arguments, loose),
        *constants,
        *constants.values(),
    )


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """`kernel[grid](*arguments, **constants)` on the current device and stream.

    `constants` are the kernel's last parameters, in its order. `maxnreg` limits the registers per
    thread on devices that can. Products and sums are never contracted.
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
        key = _key(kernel, device, (num_warps, maxnreg), arguments, constants)
        compiled = _compiled.get(key)
        if compiled is not None:
            x, y, z = (*grid, 1, 1)[:3]
            compiled.run(
                x, y, z, driver.get_current_stream(device), compiled.function,
                compiled.packed_metadata, None, None, None, *arguments, *constants.values(),
            )  # fmt: skip
            return
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
    if maxnreg is not None and not _HIP:
        options["maxnreg"] = maxnreg
    compiled = kernel[grid](*arguments, **constants, **options)
    if direct:
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = compiled


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's takes 1.9 us, as it serves constants of kernels too.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()
