"""From CUDA C++ source to a launch: NVRTC, a cache of its results, and the driver's library.

All by ctypes: `torch.cuda._compile_kernel` is private and passes integers as 32 bits, and PTX made
ahead by a new nvcc wants a newer driver than torch does.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fedmap_sparse._files import write_atomically

_OPTIONS = (b"--std=c++17", b"--fmad=false")


def _nvrtc_names() -> Iterator[str]:
    """Where libnvrtc may be: where the loader finds it, or in NVIDIA's wheels."""
    major = (torch.version.cuda or "").split(".")[0]
    name = f"libnvrtc.so.{major}"
    yield name
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations or () if wheels else ():
        yield from (str(path) for path in Path(folder).glob(f"*/lib/{name}"))


@functools.cache
def _nvrtc() -> ctypes.CDLL | None:
    for name in _nvrtc_names():
        with suppress(OSError):
            return ctypes.CDLL(name)
    return None


@functools.cache
def _cuda() -> ctypes.CDLL | None:
    with suppress(OSError):
        return ctypes.CDLL("libcuda.so.1")
    return None


def missing() -> str:
    """Why nothing can be compiled or launched here, or an empty string."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device is available"
    if _cuda() is None:
        return "the driver's library libcuda.so.1 did not load"
    if _nvrtc() is None:
        return f"libnvrtc of CUDA {torch.version.cuda} did not load; CUDA builds of torch bring it"
    return ""


def source(stem: str) -> dict[str, bytes]:
    """csrc/cuda/<stem>.cu, then the headers beside it, by name: from the installed package, or from
    the tree that it is built in."""
    here = Path(__file__).resolve().parent
    for folder in (here, here.parents[1] / "csrc" / "cuda"):
        path = folder / f"{stem}.cu"
        if path.exists():
            files = [path, *sorted(folder.glob("*.h"))]
            return {file.name: file.read_bytes() for file in files}
    raise RuntimeError(f"csrc/cuda/{stem}.cu: not found in {here} nor in the source tree")


def compile_cubin(files: dict[str, bytes], arch: str) -> bytes:
    """Machine code of a source, the first of `files`, for one architecture, as "sm_90".

    Raises:
        RuntimeError: no libnvrtc, or it refused the source; the message holds its log.
    """
    nvrtc, (name, *names) = _nvrtc(), files
    if nvrtc is None:
        raise RuntimeError(f"{name}: libnvrtc of CUDA {torch.version.cuda} did not load")
    program = ctypes.c_void_p()
    texts = ctypes.c_char_p * len(names)
    _checked(nvrtc, nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), files[name], name.encode(), len(names),
        texts(*[files[n] for n in names]), texts(*[n.encode() for n in names])))  # fmt: skip
    try:
        options = (*_OPTIONS, f"--gpu-architecture={arch}".encode())
        code = nvrtc.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        if code:
            log = _text(nvrtc, "nvrtcGetProgramLog", program)
            raise RuntimeError(
                f"{name}: NVRTC refused it for {arch}: {log.decode(errors='replace')}"
            )
        return _text(nvrtc, "nvrtcGetCUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _checked(nvrtc: Any, code: int) -> None:
    if code:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}")


def _text(nvrtc: Any, getter: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _checked(nvrtc, getattr(nvrtc, f"{getter}Size")(program, ctypes.byref(size)))
    out = ctypes.create_string_buffer(size.value)
    _checked(nvrtc, getattr(nvrtc, getter)(program, out))
    return out.raw


def _cached(files: dict[str, bytes], arch: str) -> bytes:
    """As `compile_cubin`, from a file if this NVRTC has compiled it before."""
    nvrtc = _nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvrtc is not None:
        nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    name, *_ = files
    parts = (*files.values(), *_OPTIONS, arch.encode(), f"{major.value}.{minor.value}".encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "fedmap_sparse" / f"{name}.{arch}.{digest[:32]}.cubin"
    with suppress(OSError):
        return path.read_bytes()
    code = compile_cubin(files, arch)
    with suppress(OSError):  # such as a home that cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, code)
    return code


def _call(name: str, *arguments: Any) -> None:
    """A function of the driver API.

    Raises:
        RuntimeError: it failed; the message has the driver's own words.
    """
    cuda = _cuda()
    if cuda is None:
        raise RuntimeError("the driver's library libcuda.so.1 did not load")
    if code := getattr(cuda, name)(*arguments):
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


class Kernel:
    """One entry of a source on one device."""

    def __init__(self, stem: str, entry: str, device: int) -> None:
        card = torch.cuda.get_device_properties(device)
        torch.cuda.current_stream(device)  # makes the device's context, if nothing has so far
        code = _cached(source(stem), f"sm_{card.major}{card.minor}")
        self._module, self._entry = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(self._module), code)
        _call("cuModuleGetFunction", ctypes.byref(self._entry), self._module, entry.encode())
        #: How many blocks of one per multiprocessor the device holds at once.
        self.resident = card.multi_processor_count

    def launch(self, blocks: int, threads: int, stream: int, argument: Any) -> None:
        """All blocks at once, with one argument, a ctypes buffer that holds a struct."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        _call("cuLaunchCooperativeKernel", self._entry, blocks, 1, 1, threads, 1, 1, 0,
              ctypes.c_void_p(stream), pointers)  # fmt: skip


@functools.cache
def kernel(stem: str, entry: str, device: int) -> Kernel:
    """Compiled and loaded once per device."""
    return Kernel(stem, entry, device)


def zero(pointer: int, words: int, stream: int) -> None:
    """32-bit zeros, in the stream's order."""
    _call("cuMemsetD32Async", ctypes.c_uint64(pointer), 0, ctypes.c_size_t(words),
          ctypes.c_void_p(stream))  # fmt: skip
