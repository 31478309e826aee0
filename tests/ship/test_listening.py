"""Sockets, and the processes behind them."""

from __future__ import annotations

import socket

import pytest

from headstart.errors import ConfigError
from headstart.ship import listening


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with listening.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"Port {port} of 127\.0\.0\.1 is taken.*--port"):
            listening.bind("127.0.0.1", port)


def test_a_port_is_free_again_at_once() -> None:
    with listening.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            first.accept()[0].close()
    listening.bind("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["nowhere.invalid", "256.1.1.1", "\udcff", "a" * 300])
def test_hosts_that_are_none(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    if host.endswith(".invalid"):
        monkeypatch.setattr(socket, "getaddrinfo", fails)
    with pytest.raises(ConfigError, match="no address of this machine"):
        listening.bind(host, 0)
    with pytest.raises(ConfigError, match="cannot be listened at"):
        monkeypatch.undo()
        listening.bind("192.0.2.1", 0)  # somebody else's


def test_answers_do_not_wait_for_nagle() -> None:
    """asyncio sets TCP_NODELAY on what it accepts only where the protocol is named."""
    with listening.bind("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP


def test_addresses() -> None:
    with listening.bind("127.0.0.1", 0) as bound:
        assert listening.address_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1", "LOCALHOST"):
        assert listening.is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.0.4", "example.org", "127.evil.example", ""):
        assert not listening.is_loopback(host)
