"""What a message's time is made of: kernels, copies, and the rest, which is the host's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu_run.waits import fetched, host_us, profiled


def split(row: dict[str, Any], run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Of a row with `us` and `kernels_us`: sums of kernels and of copies, what neither explains
    (less than nothing where they overlap), wall time, where the host waits, where its Python goes;
    and of a message written, the host's own work on its bytes."""
    copies = sum(us for name, us in row["kernels_us"].items() if name.startswith("Memcpy"))
    kernels = sum(row["kernels_us"].values()) - copies
    found = {
        "kernels": round(kernels, 1),
        "copies": round(copies, 1),
        "host": round(row["us"] - kernels - copies, 1),
        "wall": host_us(run, 20),
    }
    with fetched(device) as seen:
        made = run()
    parts = {name: host_us(part, 20) for name, part in _host(made).items()}
    return {"split_us": {**found, **parts}, "waits": seen, "profile": profiled(run, 20)}


def _host(made: object) -> dict[str, Callable[[], object]]:
    if not isinstance(made, bytes):
        return {}
    from fedmap_sparse import _transfer
    from fedmap_sparse.codec import container

    header, sections = container.parse(made)
    payload = container.tensor_view(memoryview(made), torch.uint8)
    pinned = torch.empty(len(made), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return {
        "host: checksum": lambda: container.crc32c(made),
        "host: parse": lambda: container.parse(made),
        "host: join": lambda: container.join(header, sections),
        "host: b''.join": lambda: b"".join([made[:64], memoryview(made)[64:]]),
        "host: copy to pinned memory": lambda: _transfer.copy(payload, pinned),
    }
