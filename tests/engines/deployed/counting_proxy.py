"""A TCP proxy on loopback that counts: TARGET_PORT FILE. Prints its own port; writes the bytes."""

import json
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

target, file = int(sys.argv[1]), Path(sys.argv[2])
counted = {"up": 0, "down": 0}
lock = threading.Lock()


def pump(source: socket.socket, sink: socket.socket, way: str) -> None:
    try:
        while chunk := source.recv(1 << 16):
            with lock:
                counted[way] += len(chunk)
            sink.sendall(chunk)
    except OSError:
        pass
    finally:
        for s in (source, sink):
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)


def end(*_: object) -> None:
    with lock:
        file.write_text(json.dumps(counted))
    sys.exit(0)


signal.signal(signal.SIGTERM, end)
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    client, _ = server.accept()
    try:
        link = socket.create_connection(("127.0.0.1", target))
    except OSError:
        client.close()
        continue
    for way in ((client, link, "up"), (link, client, "down")):
        threading.Thread(target=pump, args=way, daemon=True).start()
