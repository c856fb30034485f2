"""The network interface towards rank 0, for backends that would take the host's own name.

gloo binds to the address that the host's name stands for. On many machines the name does not
resolve, or stands for a loopback address (Debian's 127.0.1.1), and then no other host can connect.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket

import psutil

from megamask.process.place import Place

VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface(place: Place) -> str | None:
    """Name the interface towards rank 0 to gloo, where the host's own name would mislead it and
    the user named none.

    Returns:
        The interface that was chosen; None where nothing was to be chosen.
    """
    if (
        place.world == 1
        or os.environ.get(VARIABLE)
        or _is_reachable(_address(socket.gethostname()))
    ):
        return None
    master = _address(place.master)
    if not _is_reachable(master):  # all ranks are on this host
        return None
    name = interface_towards(master)
    if name is not None:
        os.environ[VARIABLE] = name
    return name


def interface_towards(address: str) -> str | None:
    """The interface through which this host reaches an address; its own, where it is one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((address, 9))  # sends nothing
        source = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(one.address.partition("%")[0] == source for one in addresses):
                return name
    return None


def _address(host: str) -> str:
    """The first address of a host; empty where the name does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    return str(found[0][4][0])


def _is_reachable(address: str) -> bool:
    """Whether other hosts may reach an address."""
    try:
        return not ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
