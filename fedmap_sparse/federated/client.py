"""The client's half of a round: it receives the global model, trains, and answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import codec, ops
from fedmap_sparse.codec import Message
from fedmap_sparse.federated.aggregation import Bytes
from fedmap_sparse.federated.global_model import write_buffers, write_model
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.optim import MaskedOptimizer

MakeOptimizer = Callable[[FlatParameters, Mask, float | None], MaskedOptimizer]


class FedMapClient:
    """Receives the global model into its own module, and answers with what it trained.

    Args:
        params: the flattened local model; same layout as the server's, any of the three dtypes.
        optimizer: `(params, mask, lr) -> MaskedOptimizer`, called at each `receive` (state is fresh
            each round); lr is the broadcast's, or None. Its result is `client.optimizer`. None:
            the caller trains as it likes.
        keep_optimizer: keep one optimizer over rounds; its state follows the mask, its learning
            rate the broadcast.
        dtype: of the values in an update: "float32", "float16", "bfloat16" or "int8". With int8 the
            client keeps the error of each update and makes it good in its next (error feedback).
        delta: send differences from the broadcast instead of values: smaller numbers, which lose
            less in few bits. float32 differences are rounded, so they are not lossless.
        lossless: entropy-code the values where that is smaller; they stay the same.
        prox_mu: FedProx (Li et al., arXiv 1812.06127): each step of `optimizer` adds
            `prox_mu * (w - w_received)` to the gradient. 0: off.
    """

    def __init__(
        self,
        params: FlatParameters,
        *,
        optimizer: MakeOptimizer | None = None,
        keep_optimizer: bool = False,
        dtype: str = "float32",
        delta: bool = False,
        lossless: bool = True,
        prox_mu: float = 0.0,
    ) -> None:
        codec.check_dtype(dtype)
        if not prox_mu >= 0:
            raise ValueError(f"prox_mu: expected at least 0, got {prox_mu}")
        if prox_mu and optimizer is None:
            raise ValueError("prox_mu: expected an optimizer to add the term in, got None")
        params.check_bound()
        self.params = params
        self.layout = params.layout
        self.dtype = dtype
        self.delta = delta
        self.lossless = lossless
        self.prox_mu = prox_mu
        self.keep_optimizer = keep_optimizer
        self.optimizer: MaskedOptimizer | None = None
        self._make_optimizer = optimizer
        self._received: tuple[bytes, int, int] | None = None
        self._base: Message | None = None
        self._residual: Tensor | None = None
        self._mask: Mask | None = None
        self._anchor: Tensor | None = None

    @property
    def have(self) -> bytes | None:
        """Digest of the mask this client holds, for `FedMapServer.broadcast`; None at first."""
        return None if self._mask is None else self._mask.digest()

    def receive(self, data: Bytes) -> Message:
        """Take a broadcast: weights (+0.0 where pruned), tail, buffers and mask.

        Returns:
            The decoded message; `.round` and `.meta` (with "lr") may be of use. Its tensors view
            `data`.

        Raises:
            NeedsMask: it builds on a mask that this client lacks.
            FormatError: it is not sound, or of another layout.
            RuntimeError: the module's parameters are no longer views (see `rebind`).
            In each case nothing is changed.
        """
        self.params.check_bound()
        message = codec.decode(data, self.layout, mask=self._mask, device=self.params.values.device)
        lr = message.meta.get("lr")
        mask = message.mask
        write_model(self.params, mask, message.packed, message.tail)
        write_buffers(self.params, message.buffers)
        self._keep_residual(mask)
        self._mask = mask
        self._received = (message.broadcast_digest, message.round, message.epoch)
        self._base = message if self.delta else None
        if self.prox_mu:
            self._anchor = self.params.values.clone()
        self._renew_optimizer(lr if isinstance(lr, float) else None)
        return message

    def _keep_residual(self, mask: Mask) -> None:
        """Let the error of earlier updates follow the mask."""
        if self.dtype != "int8":
            return
        old = self._mask
        if self._residual is not None and old is not None and mask <= old:
            self._residual = ops.pack(self._residual, ops.extract(mask, old))
        else:
            self._residual = torch.zeros(mask.nnz, device=mask.device)

    def _renew_optimizer(self, lr: float | None) -> None:
        if self._make_optimizer is None or self._mask is None:
            return
        if self.optimizer is not None and self.keep_optimizer:
            if lr is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
            return
        self.optimizer = self._make_optimizer(self.params, self._mask, lr)
        if self.prox_mu:
            self.optimizer.register_step_pre_hook(self._add_proximal)

    @torch.no_grad()
    def _add_proximal(self, *_: Any) -> None:
        assert self._anchor is not None
        for p, e in zip(self.params.parameters, self.layout.entries, strict=True):
            if p.grad is not None:
                start = self._anchor[e.offset : e.offset + e.numel].view(e.shape)
                p.grad.add_(p - start, alpha=self.prox_mu)

    def update(self, num_samples: int, loss: float | None = None) -> bytes:
        """The answer to the last broadcast: survivors' values, tail and buffers; no mask.

        Args:
            num_samples: this client's weight in the mean, at least 1.
            loss: its mean training loss, for the round's result.

        Raises:
            RuntimeError: nothing was received yet, or the parameters are no longer views.
            ValueError: `num_samples` below 1, or values beyond the wire dtype's range.
        """
        if self._received is None or self._mask is None:
            raise RuntimeError("update: expected receive() first")
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        self.params.check_bound()
        digest, round, epoch = self._received
        residual = None if self._residual is None else self._residual.clone()
        data = codec.encode(
            self.params,
            self._mask,
            dtype=self.dtype,
            base=self._base,
            lossless=self.lossless,
            residual=residual,
            round=round,
            epoch=epoch,
            num_samples=num_samples,
            answers=digest,
            meta=None if loss is None else {"loss": float(loss)},
        )
        self._residual = residual
        return data

    def state_dict(self) -> dict[str, Any]:
        """What a client keeps between rounds beside its data: its mask, the error of its last int8
        update, and a kept optimizer."""
        return {
            "mask": None if self._mask is None else self._mask.words.clone(),
            "residual": None if self._residual is None else self._residual.clone(),
            "optimizer": self.optimizer.state_dict()
            if self.optimizer is not None and self.keep_optimizer
            else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`: the next `receive` may bring a delta over the mask.

        Raises:
            ValueError: a mask of another layout.
        """
        if state["mask"] is None:
            self._mask = None
            return
        words = state["mask"].to(self.params.values.device, copy=True)
        mask = Mask.from_words(words, self.layout.prunable_numel)
        residual = state["residual"]
        if residual is not None and residual.numel() != mask.nnz:
            raise ValueError(f"residual: expected {mask.nnz} elements, got {residual.numel()}")
        self.params.mask = mask
        self._mask = mask
        self._residual = None if residual is None else residual.to(mask.device, copy=True)
        if state["optimizer"] is not None and self._make_optimizer is not None:
            self._renew_optimizer(state["optimizer"]["param_groups"][0]["lr"])
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state["optimizer"])
