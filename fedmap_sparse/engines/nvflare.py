"""NVFlare: the codec as a pair of filters around anyone's job, and the round as a controller."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.workflows.model_controller import ModelController

from fedmap_sparse._files import write_atomically
from fedmap_sparse.codec import Message
from fedmap_sparse.engines.records import MAX_NUMEL, decode_arrays, encode_arrays
from fedmap_sparse.errors import NeedsMask, RoundFailed
from fedmap_sparse.federated import FedMapClient, FedMapServer

KINDS = [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF]
ALGORITHM, SPEC = "fedmap_sparse", "fedmap_sparse.arrays"

Train = Callable[[FedMapClient, Message], tuple[int, float | None]]

# NVFlare writes a job's components to JSON: it reads attributes named as the arguments are.


class FedMapEncoder(DXOFilter):  # type: ignore[misc, unused-ignore]
    """Weights as one message, on the way out of server or client.

    Args:
        dtype: of the values on the wire; float32 loses nothing.
        sparse: leave out the zeros of matrices, which come back as +0.0; False keeps -0.0.

    NVFlare runs the server's filters once per client: a broadcast is encoded for each.
    """

    def __init__(self, dtype: str = "float32", sparse: bool = True) -> None:
        super().__init__(supported_data_kinds=KINDS, data_kinds_to_filter=KINDS)
        self.dtype = dtype
        self.sparse = sparse

    def process_dxo(self, dxo: DXO, shareable: Any, fl_ctx: Any) -> DXO | None:
        if dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM):
            return None  # encrypted, say: no arrays any more
        arrays = {name: np.asarray(value) for name, value in dxo.data.items()}
        message, spec = encode_arrays(arrays, dtype=self.dtype, sparse=self.sparse)
        out = DXO(dxo.data_kind, {"message": message}, dict(dxo.meta))
        out.set_meta_prop(MetaKey.PROCESSED_ALGORITHM, ALGORITHM)
        out.set_meta_prop(SPEC, spec)
        return out


class FedMapDecoder(DXOFilter):  # type: ignore[misc, unused-ignore]
    """The weights of such a message, on the way in; others pass.

    Args:
        max_numel: the most elements that a message may claim.
    """

    def __init__(self, max_numel: int = MAX_NUMEL) -> None:
        super().__init__(supported_data_kinds=KINDS, data_kinds_to_filter=KINDS)
        self.max_numel = max_numel

    def process_dxo(self, dxo: DXO, shareable: Any, fl_ctx: Any) -> DXO | None:
        if dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM) != ALGORITHM:
            return None
        message, spec = dxo.data["message"], dxo.get_meta_prop(SPEC)
        arrays = decode_arrays(message, spec, max_numel=self.max_numel)
        out = DXO(dxo.data_kind, arrays, dict(dxo.meta))
        out.remove_meta_props([MetaKey.PROCESSED_ALGORITHM, SPEC])
        return out


def fedmap_answer(model: FLModel, client: FedMapClient, train: Train) -> FLModel:
    """What a client script sends back for a model that it received from `FedMapController`.

    Args:
        model: what `flare.receive()` gave.
        client: the same in every round: the script's process lives through the job.
        train: `(client, broadcast) -> (samples, mean loss)`, in place.
    """
    try:
        received = client.receive(_message_of(model))
    except NeedsMask:
        return FLModel(params=_params(b""), meta=_about(client, needs_mask=True))
    data = client.update(*train(client, received))
    return FLModel(params=_params(data), meta=_about(client, needs_mask=False))


def _about(client: FedMapClient, needs_mask: bool) -> dict[str, Any]:
    return {"have": (client.have or b"").hex(), "needs_mask": needs_mask}


def _params(message: bytes) -> dict[str, np.ndarray]:
    return {"message": np.frombuffer(message, np.uint8)}


def _message_of(model: FLModel) -> bytes:
    return np.asarray(model.params["message"], np.uint8).tobytes()


class FedMapController(ModelController):  # type: ignore[misc, unused-ignore]
    """The rounds of a `FedMapServer` over NVFlare's clients.

    Clients are known by their site names, in whose order updates are summed.

    Args:
        server: "module:function", which makes the server; a job is JSON, so it cannot hold one.
        num_rounds: in all: with a checkpoint, those that are left are run.
        num_clients: to wait for and to send to.
        checkpoint: a file for the server's state, written after each round and read if it exists.
        timeout: seconds to wait for the answers of a round; 0: for ever.
        resend: how often a client that lost its mask is sent it again within a round.
    """

    def __init__(
        self,
        server: str,
        num_rounds: int = 3,
        num_clients: int = 2,
        checkpoint: str = "",
        timeout: int = 0,
        resend: int = 1,
    ) -> None:
        super().__init__()
        self.server = server
        self.num_rounds = num_rounds
        self.num_clients = num_clients
        self.checkpoint = checkpoint
        self.timeout = timeout
        self.resend = resend
        self._have: dict[str, bytes] = {}

    def run(self) -> None:
        module, _, name = self.server.partition(":")
        server: FedMapServer = getattr(importlib.import_module(module), name)()
        path = Path(self.checkpoint) if self.checkpoint else None
        if path is not None and path.exists():
            server.from_bytes(path.read_bytes())
        while server.round < self.num_rounds:
            server.begin_round()
            updates = self._updates(server, sorted(self.sample_clients(self.num_clients)))
            try:
                result = server.aggregate(updates.items())
            except RoundFailed as error:
                self.panic(str(error))
                return
            about = {"nnz": server.mask.nnz, "loss": result.loss, "refused": result.refused}
            self.info(f"round {result.round}: {len(result.accepted)} updates, {json.dumps(about)}")
            if path is not None:
                write_atomically(path, server.to_bytes())

    def _updates(self, server: FedMapServer, clients: list[str]) -> dict[str, bytes]:
        updates: dict[str, bytes] = {}
        for _ in range(self.resend + 1):
            # One task for all that need the same bytes.
            groups: dict[bytes | None, list[str]] = {}
            for client in clients:
                groups.setdefault(self._have.get(client), []).append(client)
            again: list[str] = []
            for have, group in groups.items():
                model = FLModel(
                    params_type=ParamsType.FULL,
                    params=_params(server.broadcast(have)),
                    current_round=server.round,
                    total_rounds=self.num_rounds,
                )
                answers = self.send_model_and_wait(targets=group, data=model, timeout=self.timeout)
                again += self._sorted_out(answers, updates)
            clients = again
            if not clients:
                break
        return updates

    def _sorted_out(self, answers: Iterable[FLModel], updates: dict[str, bytes]) -> list[str]:
        """Put the updates among `answers` into `updates`; who has to be sent the mask again."""
        again = []
        for answer in answers:
            name = str(answer.meta["client_name"])
            try:
                have, missing = bytes.fromhex(answer.meta["have"]), answer.meta["needs_mask"]
                data = _message_of(answer)
            except (KeyError, TypeError, ValueError) as error:
                self.warning(f"{name} is left out: {error}")
                self._have.pop(name, None)
                continue
            self._have[name] = have
            if missing:
                again.append(name)
            else:
                updates[name] = data
        return again
