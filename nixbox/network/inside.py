"""The part of the guard that lives inside a machine's namespace: it holds the packet filter and opens the sockets.

It is forked from the guard, enters the namespaces with all rights over them and nothing else, and serves requests on
a socket until the guard is gone.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

from nixbox import light
from nixbox.network import namespace, policy
from nixbox.plan.network import GUEST_MAC, mac_bytes

# linux/sockios.h
_SIOCADDRT, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFHWADDR = 0x890B, 0x8914, 0x8916, 0x891C, 0x8924
_SIOCSARP = 0x8955
_ATF_COM = 0x02  # linux/if_arp.h
_ARPHRD_ETHER = 1
_RTF_UP = 1
_LAST_METRIC = 10_000
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_NETLINK_ROUTE, _NETLINK_NETFILTER = 0, 12
_RTMGRP_IPV4_ROUTE = 0x40  # linux/rtnetlink.h
# linux/netfilter/nfnetlink_log.h
_NFULNL_MSG_CONFIG = 4 << 8 | 1
_NFULA_CFG_CMD, _NFULA_CFG_MODE = 1, 2
_CMD_BIND, _COPY_PACKET = 1, 2
REQUEST_BYTES = 200_000


def load(library: str) -> ctypes.CDLL | None:
    """nftables' library; None if it cannot be had: Filter says why."""
    try:
        return ctypes.CDLL(library)
    except OSError:
        return None


class Filter:
    """nftables through its own library: no program is started for a rule."""

    def __init__(self, library: str) -> None:
        self._lib = ctypes.CDLL(library)
        self._lib.nft_ctx_new.restype = ctypes.c_void_p
        self._lib.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(self._lib.nft_ctx_new(0))
        self._lib.nft_ctx_buffer_error(self._context)
        self._lib.nft_ctx_buffer_output(self._context)

    def apply(self, text: str) -> None:
        """Apply commands as one transaction. Raises OSError with nftables' own words."""
        if self._lib.nft_run_cmd_from_buffer(self._context, text.encode()) != 0:
            said = self._lib.nft_ctx_get_error_buffer(self._context) or b""
            raise OSError(0, f"nftables: {said.decode(errors='replace').strip()}")


def _configure(library: str, rules: str) -> Filter:
    """The filter first, then the device: nothing passes before there are rules."""
    nft = Filter(library)
    nft.apply(rules)
    for file, value in (("icmp_ratemask", "0"), ("ip_forward", "1")):  # a refusal that waits its turn is a time-out
        with open(f"/proc/sys/net/ipv4/{file}", "w") as out:
            out.write(value)
    set_up_device()
    return nft


def set_up_device() -> None:
    """Give the machine's end of the guest's network its address. Raises OSError."""
    with light.Socket(light.AF_INET, light.SOCK_DGRAM) as sock:

        def address(request: int, value: str) -> None:
            packed = struct.pack("16sHH4s8x", policy.DEVICE.encode(), light.AF_INET, 0, light.inet_aton(value))
            fcntl.ioctl(sock, request, packed)

        # The same in every namespace: a guest that was saved knows it still.
        mac = mac_bytes(policy.GATEWAY_MAC)
        fcntl.ioctl(sock, _SIOCSIFHWADDR, struct.pack("16sH6s16x", policy.DEVICE.encode(), _ARPHRD_ETHER, mac))
        address(_SIOCSIFADDR, policy.GATEWAY)
        mask = 0xFFFFFFFF << (32 - policy.PREFIX) & 0xFFFFFFFF
        address(_SIOCSIFNETMASK, light.inet_ntoa(struct.pack("!I", mask)))
        for name in ("lo", policy.DEVICE):
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), _IFF_UP | _IFF_RUNNING))
        _last_route(sock)
        _neighbour(sock)


def _neighbour(sock: light.Socket) -> None:
    """Where the guest is, so that nobody asks: one that is still asleep would be asked again a second later.

    Not for good (ATF_PERM): a guest may take another address.
    """
    # struct arpreq (linux/if_arp.h): both addresses as a sockaddr, flags, a mask, the device.
    there = struct.pack("@H2x4s8x", light.AF_INET, light.inet_aton(policy.GUEST))
    entry = there + struct.pack(
        "@H6s8xi16x16s", _ARPHRD_ETHER, mac_bytes(GUEST_MAC), _ATF_COM, policy.DEVICE.encode()
    )
    fcntl.ioctl(sock, _SIOCSARP, entry)


def _last_route(sock: light.Socket) -> None:
    """A default route to nowhere, after every other: what has no way out is then refused by the filter and logged."""
    device = ctypes.create_string_buffer(b"lo")
    nothing = struct.pack("=H14x", light.AF_INET)
    # struct rtentry (linux/route.h): destination, gateway and mask are 0.0.0.0.
    flags = (_RTF_UP, 0, 0, 0, _LAST_METRIC)
    entry = struct.pack("@L16s16s16sHhLPhPLLH", 0, *[nothing] * 3, *flags, ctypes.addressof(device), 0, 0, 0)
    with light.suppress(FileExistsError):
        fcntl.ioctl(sock, _SIOCADDRT, entry)


def _dns_sockets() -> tuple[light.Socket, light.Socket]:
    udp = light.Socket(light.AF_INET, light.SOCK_DGRAM)
    udp.bind((policy.GATEWAY, policy.DNS_PORT))
    tcp = light.Socket(light.AF_INET, light.SOCK_STREAM)
    tcp.setsockopt(light.SOL_SOCKET, light.SO_REUSEADDR, 1)
    tcp.bind((policy.GATEWAY, policy.DNS_PORT))
    tcp.listen(16)
    return udp, tcp


def _log_socket() -> light.Socket:
    """A netlink socket that gets every packet which the filter logs (nfnetlink_log, one message each)."""
    log = light.Socket(light.AF_NETLINK, light.SOCK_RAW, _NETLINK_NETFILTER)
    log.bind((0, 0))

    def configure(attribute: int, data: bytes) -> None:
        body = struct.pack("=BBH", light.AF_UNSPEC, 0, light.htons(policy.LOG_GROUP))
        padded = data + b"\0" * (-len(data) % 4)
        body += struct.pack("=HH", 4 + len(data), attribute) + padded
        log.send(struct.pack("=IHHII", 16 + len(body), _NFULNL_MSG_CONFIG, 0x1 | 0x4, 0, 0) + body)
        reply = log.recv(4096)
        (code,) = struct.unpack_from("=i", reply, 16)
        if code != 0:
            raise OSError(-code, f"nfnetlink_log: {os.strerror(-code)}")

    configure(_NFULA_CFG_CMD, struct.pack("=B", _CMD_BIND))
    configure(_NFULA_CFG_MODE, struct.pack("!IBB", 128, _COPY_PACKET, 0))
    return log


def _route_socket() -> light.Socket:
    """A netlink socket that has something to read whenever a route of IPv4 has come or gone."""
    routes = light.Socket(light.AF_NETLINK, light.SOCK_RAW, _NETLINK_ROUTE)
    routes.bind((0, _RTMGRP_IPV4_ROUTE))
    return routes


def has_route() -> bool:
    """Whether this process's network namespace has a way out (the main table's default route)."""
    with open("/proc/thread-self/net/route") as file:
        lines = file.read().splitlines()[1:]
    return any(line.split()[1:2] == ["00000000"] and line.split()[0] != "lo" for line in lines)


def serve(user: int, net: int, library: str, rules: str, channel: light.Socket) -> None:
    """The process's whole life: set up, answer with the sockets or with what failed, then take requests.

    Requests are `route`, whether there is a way out, and `nft` with commands after it; answers are `yes`, `no` and
    `error` with words after it.
    """
    try:
        namespace.join(user, net)
        nft = _configure(library, rules)
        sockets = [*_dns_sockets(), _log_socket(), _route_socket()]
        light.send_fds(channel, b"yes", [sock.fileno() for sock in sockets])
        for sock in sockets:
            sock.close()
    except OSError as error:
        channel.send(_error(error))
        return
    while request := channel.recv(REQUEST_BYTES):
        channel.send(_answer(nft, *request.decode().split(" ", 1)))


def _answer(nft: Filter, what: str, text: str = "") -> bytes:
    try:
        if what == "nft":
            nft.apply(text)
            return b"yes"
        return b"yes" if has_route() else b"no"
    except OSError as error:
        return _error(error)


def _error(error: OSError) -> bytes:
    return f"error {error.strerror or error}".encode()
