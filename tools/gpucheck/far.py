"""Blocks far into buffers of which only their own stretches exist, at addresses moved back by as
much: offsets beyond 2^31 elements without the memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpucheck.emulator import Emulator, Report
from gpucheck.offline import compile_kernel


def run(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    arguments: dict[str, Any],
    visible: dict[str, Tensor],
    blocks: list[int],
    warps: int = 4,
) -> Report:
    """Run these blocks of a grid that ends with the last; `visible` is what they may touch."""
    compiled = compile_kernel(kernel, signature, constants, aligned=[], num_warps=warps)
    given = {name: arguments[name] for name in kernel.arg_names if name in signature}
    report = Emulator(compiled.asm["ptx"]).run(
        (max(blocks) + 1,),
        list(given.values()),
        list(given),
        visible=list(visible.items()),
        shared_bytes=compiled.metadata.shared,
        only=blocks,
    )
    assert not report.faults
    return report


def before(t: Tensor, elements: int) -> int:
    """The address at which the buffer would begin whose element `elements` is the first of `t`."""
    return t.data_ptr() - elements * t.element_size()
