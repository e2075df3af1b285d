"""A port for the servers that tests start."""

import socket


def free_port() -> int:
    """Returns a TCP port of the loopback interface on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
