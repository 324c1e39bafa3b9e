"""The round over Flower's SecAgg+: the server sees the sum of packed differences alone.

    ServerApp: DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(...)) around SecureFedMap(server)
    ClientApp: ClientApp(mods=[secaggplus_mod]), and fedmap_secure_train(message, context, ...)

Flower's workflow takes strategies of its older form, whose records these are.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.compat.common import recorddict_compat as compat
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy

from fedmap_sparse import codec
from fedmap_sparse.engines.flower.client import ContextState, State, Train, restore
from fedmap_sparse.engines.flower.codec import STYPE, message_of
from fedmap_sparse.errors import RoundFailed
from fedmap_sparse.federated import FedMapClient, FedMapServer, RoundResult, arrays

_log = logging.getLogger("flwr")


class SecureFedMap(Strategy):
    """The rounds of a `FedMapServer` for `SecAggPlusWorkflow`.

    What is summed is each client's difference from the broadcast, `update_array` minus what it
    received: survivors, tail, float buffers. Clients count by their samples. A client that drops
    out, at any stage, is left out of the round; a round that the workflow halts is repeated by its
    next one. A node that lost its mask drops out of one round and is sent the mask in the next.

    Nobody sees single updates, so none of the server's rules on them hold: no cap on claims of
    samples, no `aggregator`, no `privacy`. The workflow's `max_weight` has to be at least the
    samples of the largest client, and `clipping_range` the largest difference.

    Args:
        server: its options are those of the round.
        min_nodes: wait for so many.
        timeout: seconds to wait for them.

    Attributes:
        results: each round's `RoundResult`; `accepted` are node ids.
    """

    def __init__(self, server: FedMapServer, *, min_nodes: int = 3, timeout: int = 3600) -> None:
        self.server, self.min_nodes, self.timeout = server, min_nodes, timeout
        self.results: list[RoundResult] = []
        self.federation = secrets.token_hex(16)
        self._have: dict[int, bytes] = {}  # node: the mask that it said it has

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        return Parameters([], STYPE)  # each round's broadcast is made when it begins

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        if not client_manager.wait_for(self.min_nodes, self.timeout):
            wanted = f"expected at least {self.min_nodes} nodes in {self.timeout} s"
            raise TimeoutError(f"{wanted}, got {client_manager.num_available()}")
        self.server.begin_round()
        found = []
        for proxy in client_manager.all().values():
            # A node that drops out is sent the whole mask next time: it may have lost its own.
            data = self.server.broadcast(self._have.pop(proxy.node_id, None))
            config: dict[str, Scalar] = {"federation": self.federation}
            found.append((proxy, FitIns(Parameters([data], STYPE), config)))
        return found

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[Any],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        for proxy, result in results:
            self._have[proxy.node_id] = bytes(result.metrics["have"])
        broadcast = codec.decode(self.server.broadcast(), self.server.layout)
        start = arrays.of_message(broadcast)
        # The workflow puts the mean in place of every client's own vector.
        (difference,) = parameters_to_ndarrays(results[0][1].parameters)
        mean = (start.double() + torch.from_numpy(difference)).float()
        samples = sum(result.num_examples for _, result in results)
        try:
            done = self.server.apply_mean(mean, samples, [p.node_id for p, _ in results])
        except (RoundFailed, ValueError) as error:  # the next round of Flower's repeats this one
            _log.warning("fedmap_sparse: %s", error)
            return None, {}
        self.results.append(done)
        return None, {}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        return []

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[Any],
    ) -> tuple[float | None, dict[str, Scalar]]:
        return None, {}

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        return None


def fedmap_secure_train(
    message: Message,
    context: Context,
    client: FedMapClient,
    train: Train,
    *,
    state: State | None = None,
) -> Message:
    """What `@app.train()` returns behind `secaggplus_mod`, which masks it.

    Args:
        message, context, client, train, state: as for `fedmap_train`. The loss that `train` gives
            is not sent.

    Raises:
        FormatError, NeedsMask, ValueError: a broadcast that is not sound, a mask that was lost,
            weights that are not finite; this client then drops out of the round.
    """
    instructions = compat.recorddict_to_fitins(message.content, keep_input=True)
    federation = str(instructions.config["federation"])
    restore(client, context, federation, state)
    received = client.receive(message_of(message.content.array_records["fitins.parameters"]))
    samples, _ = train(client, received)
    start = arrays.of_message(received)
    difference = (client.update_array() - start).cpu().numpy().astype(np.float64)
    (state or ContextState()).save(context, federation, client.to_bytes())
    result = FitRes(
        Status(Code.OK, ""),
        ndarrays_to_parameters([difference]),
        samples,
        {"have": client.have or b""},
    )
    return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=message)
