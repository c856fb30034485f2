"""Which network interface gloo is told, on this machine's own interfaces."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from megamask.process import network
from megamask.process.network import VARIABLE, choose_interface, interface_towards
from megamask.process.place import Place

SHARED = Place(rank=1, world=2, master="10.9.8.7", port=29500)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(network, "interface_towards", lambda address: f"to {address}")


def own_name(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """The host's own name stands for ``address``; the addresses of others are as they are."""
    real = socket.getaddrinfo

    def resolve(host: str, *rest: object, **more: object) -> object:
        if host == socket.gethostname():
            if not address:
                raise socket.gaierror("unknown")
            host = address
        return real(host, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.1.1", "::1"])
def test_a_host_whose_name_misleads_names_the_way_to_rank_0(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    own_name(monkeypatch, address)
    assert choose_interface(SHARED) == "to 10.9.8.7" == os.environ[VARIABLE]


def test_a_good_name_one_host_and_the_users_word_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own_name(monkeypatch, "10.9.8.6")
    assert choose_interface(SHARED) is None
    own_name(monkeypatch, "")
    assert choose_interface(Place()) is None
    assert choose_interface(Place(rank=0, world=2, master="127.0.0.1", port=1)) is None
    monkeypatch.setenv(VARIABLE, "ib0")
    assert choose_interface(SHARED) is None and os.environ[VARIABLE] == "ib0"


def test_the_interface_of_an_address_is_found() -> None:
    loopback = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(one.address == "127.0.0.1" for one in addresses)
    ]
    assert [interface_towards("127.0.0.1")] == loopback
    assert interface_towards("no address") is None
