"""A Triton driver whose device is the emulator: `kernel[grid](cpu_tensors)` compiles for a real
target with the specialisation of a real launch, and runs here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from gpucheck.emulator import Emulator, Report


class Session:
    """What an `emulate` block collected, and what its kernels may reach through tables."""

    def __init__(self, blocks: int, seed: int | None, check_races: bool) -> None:
        self.blocks, self.seed, self.check_races = blocks, seed, check_races
        self.launches: list[Report] = []
        self.kernels: list[Emulator] = []
        self.visible: list[tuple[str, torch.Tensor]] = []

    def show(self, **tensors: torch.Tensor) -> None:
        """Let kernels reach these tensors by their addresses."""
        self.visible += tensors.items()

    @property
    def faults(self) -> list[str]:
        return [
            f"{report.kernel}:{line}: {kind} x{count} in `{text}` {example}".rstrip()
            for report in self.launches
            for (kind, line), (count, text, example) in report.faults.items()
        ]

    @property
    def touched_bytes(self) -> int:
        return sum(report.touched_bytes for report in self.launches)

    @property
    def requested_bytes(self) -> int:
        return sum(report.requested_bytes for report in self.launches)


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = list(source.signature.values())
        self.names = list(source.fn.arg_names)
        self.metadata = metadata

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: Emulator,
        packed: Any,
        launch: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        session = _Driver.session
        given = [
            (name, value)
            for name, kind, value in zip(self.names, self.kinds, arguments, strict=True)
            if kind != "constexpr"
        ]
        function.resident = session.blocks
        report = function.run(
            (x, y, z),
            [value for _, value in given],
            [name for name, _ in given],
            visible=session.visible,
            shared_bytes=self.metadata.shared,
            check_races=session.check_races,
            seed=session.seed,
        )
        report.metadata = self.metadata
        session.launches.append(report)
        if function not in session.kernels:
            session.kernels.append(function)


class _Utils:
    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return 1, _Driver.loaded[kernel], 0, 0, 1024


class _Driver:
    loaded: ClassVar[dict[bytes, Emulator]] = {}
    compiled: ClassVar[dict[str, Any]] = {}
    session: Session
    launcher_cls = _Launcher
    utils = _Utils()

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are cached by device: one an architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def emulate(
    arch: int = 90, *, blocks: int = 8, seed: int | None = None, check_races: bool = True
) -> Iterator[Session]:
    """Launches inside the block run in the emulator, as compiled for `arch`."""
    config, original = triton.runtime.driver, CompiledKernel._init_handles
    active = config._active

    def init_handles(self: Any) -> None:
        if self.kernel not in _Driver.loaded:
            _Driver.loaded[self.kernel] = Emulator(self.asm["ptx"])
        original(self)

    _Driver.session = Session(blocks, seed, check_races)
    config.set_active(_Driver(arch))
    CompiledKernel._init_handles = init_handles
    try:
        yield _Driver.session
    finally:
        CompiledKernel._init_handles = original
        config._active = active


@contextlib.contextmanager
def compile_only(arch: int | str) -> Iterator[dict[str, Any]]:
    """Launches inside the block are compiled for `arch` (a string: an AMD one) and not run.

    Yields the compiled kernels by hash.
    """
    config, original = triton.runtime.driver, CompiledKernel._init_handles
    active, kernels = config._active, {}
    driver = _Driver(90)
    if isinstance(arch, str):
        driver.target = GPUTarget("hip", arch, 64)
    else:
        driver.target = GPUTarget("cuda", arch, 32)
    # A device of its own: kernels are cached by device, and those of `emulate` would run.
    driver.get_current_device = lambda: f"compile {arch}"  # type: ignore[method-assign,return-value,assignment]

    def init_handles(self: Any) -> None:
        self.module, self.function = 1, None
        self._run = lambda *arguments: _Driver.compiled.setdefault(self.hash, self)

    _Driver.compiled = kernels
    config.set_active(driver)
    CompiledKernel._init_handles = init_handles
    try:
        yield kernels
    finally:
        CompiledKernel._init_handles = original
        config._active = active
