"""What plain TCP carries, both directions at once: ``plain_tcp.py ADDRESS SECONDS listen|call``.

Prints the MB (1e6 bytes) per second that arrived here.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

PORT = 5201
BLOCK = 1 << 20
WARM_UP_SECONDS = 0.5  # TCP's slow start
PATIENCE_SECONDS = 10.0


def _connect(address: str) -> socket.socket:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return socket.create_connection((address, PORT), timeout=PATIENCE_SECONDS)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _accept(address: str) -> socket.socket:
    with socket.create_server((address, PORT)) as server:
        server.settimeout(PATIENCE_SECONDS)
        return server.accept()[0]


def _send(connection: socket.socket, seconds: float) -> None:
    block = bytes(BLOCK)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        connection.sendall(block)
    connection.shutdown(socket.SHUT_WR)


def _received(connection: socket.socket, seconds: float) -> float:
    """MB/s in a window that leaves out the start and the end."""
    block = memoryview(bytearray(BLOCK))
    started = time.monotonic()
    nbytes, first, last = 0, started, started
    while count := connection.recv_into(block):
        now = time.monotonic()
        if now - started < WARM_UP_SECONDS:
            first = last = now
        elif now - started < WARM_UP_SECONDS + seconds:
            nbytes, last = nbytes + count, now
    return nbytes / (last - first) / 1e6


def main() -> None:
    address, seconds, role = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    with _accept(address) if role == "listen" else _connect(address) as connection:
        # The sender goes on until the window of the other side is surely over.
        total = seconds + 2 * WARM_UP_SECONDS
        sender = threading.Thread(target=_send, args=(connection, total))
        sender.start()
        print(json.dumps(round(_received(connection, seconds), 2)))
        sender.join()


if __name__ == "__main__":
    main()
