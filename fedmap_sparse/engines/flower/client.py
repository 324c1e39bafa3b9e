"""What a ClientApp calls to answer a round, and where it keeps what has to last between rounds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedmap_sparse._files import write_atomically
from fedmap_sparse.codec import Message as Broadcast
from fedmap_sparse.engines.flower.codec import message_of, record_of
from fedmap_sparse.errors import NeedsMask, StateError
from fedmap_sparse.federated import FedMapClient

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"

_log = logging.getLogger("flwr")

Train = Callable[[FedMapClient, Broadcast], tuple[int, float | None]]
Evaluate = Callable[[FedMapClient, Broadcast], tuple[int, dict[str, float]]]


class State(Protocol):
    """Where a client's state (`FedMapClient.to_bytes`) is between messages."""

    def load(self, context: Context, federation: str) -> bytes | None:
        """What was saved last in this federation, or None."""

    def save(self, context: Context, federation: str, data: bytes) -> None:
        """Keep it."""


class ContextState:
    """In the node's Context: lives as long as its SuperNode and the run.

    Flower sends a Context as one object, so this suits states of a few MB: a mask takes one bit per
    prunable parameter, or less; the error of int8 updates four bytes per survivor more.
    """

    def load(self, context: Context, federation: str) -> bytes | None:
        record = context.state.config_records.get("fedmap_sparse")
        if record is None or record["federation"] != federation:
            return None
        return bytes(record["state"])

    def save(self, context: Context, federation: str, data: bytes) -> None:
        record = ConfigRecord({"federation": federation, "state": data})
        context.state.config_records["fedmap_sparse"] = record


class FileState:
    """In a file of the node's disk: outlives SuperNode, SuperLink and run.

    With it, and a `checkpoint` at the server, an interrupted run goes on as if it had not been.

    Args:
        folder: made if missing; one file per `partition-id` of the node's config (0 if none).
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)

    def _path(self, context: Context) -> Path:
        return self._folder / f"client-{int(context.node_config.get('partition-id', 0))}"

    def load(self, context: Context, federation: str) -> bytes | None:
        path = self._path(context)
        if not path.exists():
            return None
        head, _, data = path.read_bytes().partition(b"\n")
        return data if head == federation.encode() else None

    def save(self, context: Context, federation: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(context), federation.encode() + b"\n" + data)


def fedmap_train(
    message: Message,
    context: Context,
    client: FedMapClient,
    train: Train,
    *,
    state: State | None = None,
) -> Message:
    """What `@app.train()` returns: receives the model, trains, answers, keeps the state.

    Args:
        message, context: what Flower gave the ClientApp.
        client: a new one or one used before: its state is loaded.
        train: `(client, broadcast) -> (samples, mean loss)`, in place, as in `InProcessEngine`.
        state: where the client's state is kept; None: `ContextState()`.

    Raises:
        FormatError: a broadcast that is not sound; Flower turns what is raised into an error reply.
    """
    received, config = _receive(message, context, client, state)
    if received is None:
        return Message(RecordDict({CONFIG: config}), reply_to=message)
    data = client.update(*train(client, received))
    federation = str(message.content[CONFIG]["federation"])
    (state or ContextState()).save(context, federation, client.to_bytes())
    config["have"] = client.have or b""
    return Message(RecordDict({ARRAYS: record_of(data), CONFIG: config}), reply_to=message)


def fedmap_evaluate(
    message: Message,
    context: Context,
    client: FedMapClient,
    evaluate: Evaluate,
    *,
    state: State | None = None,
) -> Message:
    """What `@app.evaluate()` returns: the metrics of the global model on this client's data.

    Args:
        message, context, client, state: as for `fedmap_train`. The state stays as it was.
        evaluate: `(client, snapshot) -> (examples, {metric: value})`.
    """
    received, config = _receive(message, context, client, state)
    content = RecordDict({CONFIG: config})
    if received is not None:
        examples, metrics = evaluate(client, received)
        content[METRICS] = MetricRecord({"num-examples": examples, **metrics})
    return Message(content, reply_to=message)


def restore(client: FedMapClient, context: Context, federation: str, state: State | None) -> None:
    """Give a client the state that was kept for this federation, or none."""
    saved = (state or ContextState()).load(context, federation)
    client.load_state_dict({"mask": None})
    if saved is not None:
        try:
            client.from_bytes(saved)
        except StateError as error:
            _log.warning("fedmap_sparse: the saved state is left aside: %s", error)


def _receive(
    message: Message, context: Context, client: FedMapClient, state: State | None
) -> tuple[Broadcast | None, ConfigRecord]:
    """The broadcast, None if a mask is missing; and the record that goes back."""
    restore(client, context, str(message.content[CONFIG]["federation"]), state)
    config = ConfigRecord({"have": client.have or b"", "needs-mask": False})
    if "partition-id" in context.node_config:
        config["partition-id"] = int(context.node_config["partition-id"])
    try:
        return client.receive(message_of(message.content[ARRAYS])), config
    except NeedsMask:
        config["needs-mask"] = True
        return None, config
