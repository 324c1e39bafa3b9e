"""Messages in Flower's records, and the codec around anyone's ClientApp and strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedmap_sparse.engines.records import MAX_NUMEL, decode_arrays, encode_arrays
from fedmap_sparse.errors import FedMapError, FormatError

#: The serialization type of an Array that holds one of our messages. Flower refuses to read it as
#: NumPy, so nobody takes the bytes for weights.
STYPE = "fedmap_sparse/1"
SPEC = "fedmap_sparse.arrays."

# Flower's ErrorCode.MOD_FAILED_PRECONDITION, which is not public.
_MOD_FAILED = 6


def record_of(message: bytes) -> ArrayRecord:
    """A message as one Array: Flower cuts an Array's data, and only that, into chunks of 5 MiB."""
    return ArrayRecord({"message": Array("uint8", (len(message),), STYPE, message)})


def message_of(record: Any) -> bytes:
    """The message in an ArrayRecord; ValueError if it holds anything else."""
    if not isinstance(record, ArrayRecord):
        raise ValueError(f"expected an ArrayRecord, got {type(record).__name__}")
    found = [a.stype for a in record.values()]
    if found != [STYPE]:
        raise ValueError(f"expected one array of stype {STYPE}, got {found}")
    return bytes(next(iter(record.values())).data)


class _Codec:
    def __init__(self, dtype: str, sparse: bool, max_numel: int) -> None:
        self.dtype, self.sparse, self.max_numel = dtype, sparse, max_numel

    def encode(self, content: RecordDict) -> RecordDict:
        """The same records, each ArrayRecord as one message; nothing is changed in place."""
        out = RecordDict()
        for key, record in content.items():
            if isinstance(record, ArrayRecord):
                arrays = {name: array.numpy() for name, array in record.items()}
                message, spec = encode_arrays(arrays, dtype=self.dtype, sparse=self.sparse)
                out[key], out[SPEC + key] = record_of(message), ConfigRecord({"spec": spec})
            else:
                out[key] = record
        return out

    def decode(self, content: RecordDict) -> RecordDict:
        """What `encode` got; records that it did not write stay as they are."""
        out = RecordDict()
        for key, record in content.items():
            if key.startswith(SPEC):
                continue
            out[key] = record
            if isinstance(record, ArrayRecord) and SPEC + key in content:
                try:
                    spec = str(content[SPEC + key]["spec"])
                    arrays = decode_arrays(message_of(record), spec, max_numel=self.max_numel)
                except (ValueError, KeyError, TypeError) as error:
                    raise FormatError(f"{key}: {error}") from error
                out[key] = ArrayRecord({name: Array(a) for name, a in arrays.items()})
        return out


class CodecMod:
    """A mod for any ClientApp: arrays are decoded before it and encoded after it.

    `ClientApp(mods=[CodecMod(), ...])`: first, so that other mods (clipping, privacy) see arrays.
    The server needs `CodecGrid`.

    Args:
        dtype: of the values that the client sends. float32 loses nothing.
        sparse: leave out the zeros of matrices, which come back as +0.0; False keeps -0.0.
        max_numel: the most elements that a message may claim.
    """

    def __init__(
        self, dtype: str = "float32", *, sparse: bool = True, max_numel: int = MAX_NUMEL
    ) -> None:
        self._codec = _Codec(dtype, sparse, max_numel)

    def __call__(
        self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]
    ) -> Message:
        try:
            message.content = self._codec.decode(message.content)
        except FormatError as error:
            return Message(Error(_MOD_FAILED, str(error)), reply_to=message)
        reply = call_next(message, context)
        if not reply.has_error():
            reply.content = self._codec.encode(reply.content)
        return reply


class CodecGrid(Grid):
    """A grid for any strategy: what is sent is encoded, what comes back is decoded.

    `strategy.start(CodecGrid(grid), ...)`; the clients need `CodecMod`. A reply that cannot be
    decoded becomes an error reply, which strategies leave out. Arguments as for `CodecMod`.
    """

    def __init__(
        self,
        grid: Grid,
        dtype: str = "float32",
        *,
        sparse: bool = True,
        max_numel: int = MAX_NUMEL,
    ) -> None:
        self._grid = grid
        self._codec = _Codec(dtype, sparse, max_numel)

    def __getattr__(self, name: str) -> Any:
        if name == "_grid":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self._grid, name)

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        found: Iterable[int] = self._grid.get_node_ids()
        return found

    def _encoded(self, messages: Iterable[Message]) -> list[Message]:
        done: list[tuple[RecordDict, RecordDict]] = []  # strategies send one content to all nodes
        out = []
        for message in messages:
            if not done or done[-1][0] is not message.content:
                done.append((message.content, self._codec.encode(message.content)))
            about = message.metadata
            again = Message(done[-1][1], about.dst_node_id, about.message_type)
            again.__dict__["_metadata"] = about
            out.append(again)
        return out

    def _decoded(self, messages: Iterable[Message]) -> list[Message]:
        out = []
        for message in messages:
            if message.has_content():
                try:
                    message.content = self._codec.decode(message.content)
                except FedMapError as error:
                    message.__dict__.update(_content=None, _error=Error(_MOD_FAILED, str(error)))
            out.append(message)
        return out

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        found: Iterable[str] = self._grid.push_messages(self._encoded(messages))
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._decoded(self._grid.pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = self._grid.send_and_receive(self._encoded(messages), timeout=timeout)
        return self._decoded(replies)
