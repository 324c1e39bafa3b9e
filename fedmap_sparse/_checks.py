"""The only argument checks. Kernels trust their inputs; all public functions come through here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# mask.py imports this module too; each looks into the other only when called.
from fedmap_sparse import mask as masks

#: Codes of the native layer and of the wire, in one place.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def short(dtype: torch.dtype) -> str:
    """`torch.float32` as `float32`."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, t: object, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Raise unless `t` is a dense, contiguous tensor of one of `dtypes`."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        wanted = ", ".join(short(d) for d in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {short(t.dtype)}")
    if t.layout is not torch.strided or not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {_strides(t)}")


def _strides(t: Tensor) -> str:
    return str(t.stride()) if t.layout is torch.strided else str(t.layout)


def check_numel(name: str, t: Tensor, numel: int, why: str) -> None:
    if t.numel() != numel:
        raise ValueError(f"{name}: expected {numel} elements ({why}), got {t.numel()}")


def check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name}: expected device {device}, got {t.device}")


def check_out(
    name: str, out: Tensor, numel: int, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise unless a tensor to be written has one of `dtypes`, `numel` elements, this device."""
    check_tensor(name, out, dtypes)
    check_numel(name, out, numel, "the size of the result")
    check_device(name, out, device)


def check_mask(name: str, mask: object, numel: int | None = None) -> None:
    if not isinstance(mask, masks.Mask):
        raise TypeError(f"{name}: expected a Mask, got {type(mask).__name__}")
    if numel is not None and mask.numel != numel:
        raise ValueError(f"{name}: expected a mask over {numel} elements, got {mask.numel}")


def check_same_device(name: str, mask: masks.Mask, t: Tensor) -> None:
    check_device(name, mask.words, t.device)


def check_keep(keep: object, eligible: int, least: int = 0) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int | torch.SymInt):
        raise TypeError(f"keep: expected an int, got {type(keep).__name__}")
    if not least <= keep <= eligible:
        raise ValueError(f"keep: expected {least} <= keep <= {eligible}, got {keep}")


def plain(t: Tensor) -> Tensor:
    """`t` without autograd. The test costs 0.06 us, a detach 0.4 us of an op's 5."""
    return t.detach() if t.requires_grad else t
