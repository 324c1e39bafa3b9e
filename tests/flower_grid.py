"""A Flower Grid in one process: messages are really cut into objects and put together.

A round takes milliseconds, and nodes can be silent, restart, or lose their state on demand.
"""

import random
import uuid
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

App = Callable[[Message, Context], Message]

# What Flower's own processes set at their start; Message() asks for it.
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def over_the_wire(message: Message) -> tuple[Message, dict[str, bytes]]:
    """(the message that arrives, the objects that Flower stores and sends)."""
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
    objects = {i: o.deflate() for i, o in get_all_nested_objects(message).items()}
    again = inflate_object_from_contents(message.object_id, objects, keep_object_contents=True)
    again.metadata.__dict__.update(message.metadata.__dict__)
    return again, objects


class LocalGrid(Grid):
    """Nodes by id, each with its partition-id.

    Attributes:
        exchanges: how often messages were sent.
        up, down: bytes of all objects sent so far.
        silent: `(exchange, node) -> whether it gets nothing and says nothing`.
        tamper: changes a reply before it is sent.
    """

    def __init__(self, app: App, nodes: dict[int, int], *, shuffle: int = 0) -> None:
        self.app = app
        self.contexts: dict[int, Context] = {}
        for node, partition in nodes.items():
            self.connect(node, partition)
        self.exchanges = self.up = self.down = 0
        self.silent: Callable[[int, int], bool] = lambda exchange, node: False
        self.before: Callable[[int], None] = lambda exchange: None
        self.tamper: Callable[[int, int, Message], None] = lambda exchange, node, reply: None
        self._rng = random.Random(shuffle)

    def connect(self, node: int, partition: int) -> None:
        """A node that has just started: its Context is empty."""
        config = {"partition-id": partition}
        self.contexts[node] = Context(
            run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={}
        )

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent, replies = list(messages), []
        if not sent:
            return replies
        self.before(self.exchanges)
        for message in sent:
            node = message.metadata.dst_node_id
            arrived, objects = over_the_wire(message)
            self.down += sum(map(len, objects.values()))
            if self.silent(self.exchanges, node):
                continue
            try:
                reply = self.app(arrived, self.contexts[node])
            except Exception as error:  # as Flower does
                reply = Message(Error(code=2, reason=f"{type(error)}: {error}"), reply_to=arrived)
            reply.metadata.__dict__["_src_node_id"] = node
            self.tamper(self.exchanges, node, reply)
            if not reply.has_error():
                reply, objects = over_the_wire(reply)
                self.up += sum(map(len, objects.values()))
            replies.append(reply)
        self.exchanges += 1
        self._rng.shuffle(replies)
        return replies
