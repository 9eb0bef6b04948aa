"""`client.py SOCKET (-m MODULE | SCRIPT) …`: have it run there, as if it ran here.

Started without site packages: it is ready in a few hundredths of a second.
"""

import json
import os
import signal
import socket
import sys
from typing import Any


def ask(path: str, arguments: list[str]) -> int:
    """Have something run; returns how it ended."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"\0"], [0, 1, 2])
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        connection.sendall(json.dumps(request).encode() + b"\n")

        def pass_on(number: int, _: Any) -> None:
            connection.sendall(bytes([number]))

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        ended = connection.recv(1)
    return ended[0] if ended else 1


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
