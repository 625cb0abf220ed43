"""The guard of one machine's network: a process beside the VM that attaches the outside, answers DNS, logs refusals.

It lives in the host's namespaces, where the host's name servers are, and ends with the VM. Should it be killed, the
filter stays as it is in the kernel: names are no longer resolved, and nothing becomes wider. It is started without
the site's packages and imports little, since a machine's first command waits for it.
"""

from __future__ import annotations

import _thread
import marshal
import os
import select
import struct
import sys
import time

from nixbox import light, linux
from nixbox.network import dns, inside, policy, refusals, upstream
from nixbox.plan.network import Policy
from nixbox.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from nixbox.mounts.standin import StandIn

_LONGEST_S = 300  # of any time in an answer, so that what was admitted is asked for again and does not pile up
_GRACE_S = 60  # resolvers round, and a connection is made a moment after the answer
_ATTACH_AGAIN_S = 3.0
_ATTACH_TIMEOUT_S = 10.0
_MOST_FDS = 64
_MOST_QUESTIONS = 64  # at a time
_CLIENT_TIMEOUT_S = 10.0
_KNOWN_NAMES = 4096


class Guard:
    """All that the process holds. `settings` are what `watch.Watch.begin` sends: see there."""

    def __init__(self, settings: dict[str, Any], user: int, net: int, alive: int) -> None:
        self.policy = Policy.from_json(settings["policy"])
        self.pasta: list[str] = settings["pasta"]
        self.library: str = settings["nftables"]
        self.runtime: str = settings["runtime"]
        self.log = refusals.Log(settings["log"])
        self.servers = upstream.Servers()
        self.user, self.net, self.alive = user, net, alive
        self.outside: int | None = None  # pasta's process id
        self._outside_end = -1  # its pidfd
        self.attached_error: str | None = None
        self._attach_at = 0.0
        self._attach_until = 0.0
        self._names: dict[str, str] = {}
        self._watched: dict[
            int, tuple[str, list[dict[str, Any]], list[int]]
        ] = {}  # by pidfd: tag, queues, descriptors
        self._standing_in: dict[str, StandIn] = {}
        self._lock = _thread.allocate_lock()  # for the helper's channel, the log and the names
        self._answering = 0  # questions
        self._counting = _thread.allocate_lock()
        self._polled = select.poll()
        self._ready = False

    # --- the helper in the namespace ---

    def enter(self) -> None:
        """Start the helper and take its sockets. Raises OSError with what it could not do."""
        ours, theirs = light.socket_pair(light.SOCK_SEQPACKET)
        self.helper = os.fork()
        if self.helper == 0:
            code = 1
            try:
                ours.close()
                light.signal(light.SIGTERM, light.SIG_DFL)
                inside.serve(self.user, self.net, self.library, policy.ruleset(self.policy), theirs)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        self.channel = ours
        data, fds = light.receive_fds(ours, inside.REQUEST_BYTES, 4)
        _understood(data)
        self.udp, self.tcp, self.packets, self.routes = (light.Socket(fileno=fd) for fd in fds)

    def _request(self, words: str) -> bool:
        """Ask the helper (inside.serve). Raises OSError when it cannot do it."""
        with self._lock:
            self.channel.send(words.encode())
            return _understood(self.channel.recv(inside.REQUEST_BYTES))

    # --- the outside ---

    def attach(self) -> None:
        """Begin to connect the namespace with the world as this user's own processes see it."""
        self.detach()
        with open(f"{self.runtime}/pasta.log", "wb") as out:
            self.outside = _start([*self.pasta, str(self.helper)], out.fileno())
        self._outside_end = os.pidfd_open(self.outside)
        self._polled.register(self._outside_end, select.POLLIN)
        with open(f"{self.runtime}/pasta.pid", "w") as file:
            file.write(str(self.outside))
        self._attach_until = time.monotonic() + _ATTACH_TIMEOUT_S

    def detach(self) -> None:
        """End the outside; established connections end with it."""
        if self.outside is not None:
            os.kill(self.outside, light.SIGKILL)
            os.waitpid(self.outside, 0)
            self._forget_outside()

    def _forget_outside(self) -> None:
        self.outside = None
        self._polled.unregister(self._outside_end)
        os.close(self._outside_end)

    def _on_routes(self) -> None:
        """A route came or went: the loop looks next."""
        with light.suppress(OSError):  # more than fits its buffer came at once
            self.routes.recv(1 << 16)

    def _look_outside(self) -> None:
        """Notice that it is attached, or that it is not, and then try again: a host's network comes and goes."""
        now = time.monotonic()
        if self.policy.mode == "off":
            self._say_ready()
        elif self.outside is None:
            if now >= self._attach_at:
                self.attach()
        elif (ended := os.waitpid(self.outside, os.WNOHANG))[0]:
            with open(f"{self.runtime}/pasta.log", errors="replace") as log:
                words = [line for line in log.read().splitlines() if line.strip()]
            code = os.waitstatus_to_exitcode(ended[1])
            self.attached_error = words[-1] if words else f"pasta ended with code {code}"
            self._forget_outside()
            self._attach_at = now + _ATTACH_AGAIN_S
            self._say_ready()
        elif not self._ready or self.attached_error is not None:
            if self._request("route"):
                self.attached_error = None
                self._say_ready()
            elif now > self._attach_until:
                self.attached_error = "pasta did not configure a route"
                self._say_ready()

    def _say_ready(self) -> None:
        if not self._ready:
            self._ready = True
            with light.suppress(OSError):
                _say("ready", self.attached_error or "")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    # --- names ---

    def _resolve(self, data: bytes) -> tuple[dns.Question, bytes] | None:
        """The answer to a guest's message; None when it deserves none."""
        try:
            question = dns.parse_query(data)
        except ValueError:
            return None
        if not policy.resolves(self.policy, question.name):
            if not question.name.endswith(".arpa"):
                self._refused("dns", question.name, None, policy.DNS_PORT, self._why_no_name())
            return question, question.answer(dns.NXDOMAIN)
        # The guest has IPv4 only; and the addresses in an HTTPS record are hints that would be refused.
        if question.kind in (dns.AAAA, dns.SVCB, dns.HTTPS):
            return question, question.answer(dns.NOERROR)
        if question.kind == dns.ANY:
            return question, question.answer(dns.NOTIMP)
        answer = upstream.resolve(question, self.servers.now(), _LONGEST_S)
        if answer is None:
            return question, question.answer(dns.SERVFAIL)
        if answer.addresses:
            inner = [address for address in answer.addresses if not policy.admits(self.policy, address)]
            if inner and self.policy.mode == "filtered":
                self._refused("dns", question.name, inner[0], policy.DNS_PORT, "the name has a private address")
                return question, question.answer(dns.NXDOMAIN)
            with self._lock:
                if len(self._names) > _KNOWN_NAMES:
                    self._names.clear()
                self._names.update(dict.fromkeys(answer.addresses, question.name))
            if self.policy.mode == "filtered":
                seconds = _LONGEST_S + _GRACE_S
                try:
                    admitted = policy.admission((address, seconds) for address in answer.addresses)
                    self._request(f"nft {admitted}")
                except OSError:
                    return question, question.answer(dns.SERVFAIL)
        return question, answer.message

    def _why_no_name(self) -> str:
        return "network.mode is off" if self.policy.mode == "off" else "not in network.domains"

    def _refused(self, protocol: str, name: str | None, address: str | None, port: int | None, reason: str) -> None:
        with self._lock:
            if name is None and address is not None:
                name = self._names.get(address)
            self.log.write(refusals.Refusal(round(time.time(), 3), protocol, name, address, port, reason))

    def _on_udp(self) -> None:
        data, asker = self.udp.recvfrom(dns.LONGEST)
        self._begin(self._answer_udp, data, asker)

    def _begin(self, answer: Callable[..., None], *arguments: Any) -> bool:
        """Have a thread answer; whether one does: there may be too many."""
        with self._counting:
            if self._answering == _MOST_QUESTIONS:
                return False
            self._answering += 1
        try:
            _thread.start_new_thread(self._in_thread, (answer, arguments))
        except RuntimeError:  # this user may have no more (RLIMIT_NPROC, pids.max)
            self._answered()
            return False
        return True

    def _in_thread(self, answer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            answer(*arguments)
        finally:
            self._answered()

    def _answered(self) -> None:
        with self._counting:
            self._answering -= 1

    def _answer_udp(self, data: bytes, asker: Any) -> None:
        try:
            found = self._resolve(data)
            if found is not None:
                question, answer = found
                if len(answer) > question.size:
                    answer = question.answer(dns.NOERROR, cut=True)
                self.udp.sendto(answer, asker)
        except OSError:
            return  # the guest is gone, or its queue is full; it asks again

    def _on_tcp(self) -> None:
        client, _ = self.tcp.accept()
        if not self._begin(self._serve_tcp, client):
            client.close()

    def _serve_tcp(self, client: light.Socket) -> None:
        try:
            with client:
                client.settimeout(_CLIENT_TIMEOUT_S)
                while data := upstream.read_message(client):
                    found = self._resolve(data)
                    if found is None:
                        return
                    client.sendall(struct.pack("!H", len(found[1])) + found[1])
        except OSError:
            return

    # --- refused connections ---

    def _on_packets(self) -> None:
        try:
            message = self.packets.recv(1 << 16)
        except OSError:  # more than fits its buffer came at once
            return
        for packet in refusals.packets(message):
            found = refusals.destination(packet)
            if found is not None:
                protocol, address, port = found
                self._refused(protocol, None, address, port, self._why_not(protocol, address, port))

    def _why_not(self, protocol: str, address: str, port: int | None) -> str:
        mode = self.policy.mode
        if mode == "off":
            return "network.mode is off"
        if ":" in address:
            return "the machine has no IPv6"
        if not self.policy.allow_private and policy.is_private(address):
            return "a private address"
        if protocol != "tcp":
            return "only TCP leaves in network.mode filtered"
        if port not in (self.policy.ports or policy.DEFAULT_PORTS):
            return "not in network.ports"
        return "no allowed name was resolved to it"

    # --- requests of the command line ---

    def _on_control(self) -> None:
        client, _ = self.control.accept()
        with client:
            client.settimeout(1.0)
            with light.suppress(OSError, ValueError, KeyError):
                data, fds = light.receive_fds(client, 1 << 16, _MOST_FDS)
                import json  # of no use until somebody asks

                request = json.loads(data)
                if "watch" in request:
                    self._watch(request["watch"], fds)
                if "forget" in request:
                    self._forget(request["forget"])
                client.sendall(json.dumps(self._do(request)).encode())

    # --- mounts ---

    def _watch(self, what: dict[str, Any], fds: list[int]) -> None:
        """Watch over a process that serves a mount: its pidfd comes first, then what it takes to stand in for it."""
        pidfd, *rest = fds
        self._watched[pidfd] = (what["tag"], what["queues"], rest)
        self._polled.register(pidfd, select.POLLIN)

    def _ended(self, pidfd: int) -> None:
        """Such a process is gone: nobody in the guest shall wait for it."""
        from nixbox.mounts import standin

        tag, queues, fds = self._watched.pop(pidfd)
        self._polled.unregister(pidfd)
        os.close(pidfd)
        stand_in = standin.StandIn(standin.Device.from_json(queues, fds))
        self._standing_in[tag] = stand_in
        stand_in.start()

    def _forget(self, tag: str) -> None:
        """A mount was taken away: its process may end."""
        if tag in self._standing_in:
            self._standing_in.pop(tag).stop()
        for pidfd in [fd for fd, watched in self._watched.items() if watched[0] == tag]:
            self._polled.unregister(pidfd)
            for fd in (pidfd, *self._watched.pop(pidfd)[2]):
                os.close(fd)

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        if "allow" in request:
            domains = (*self.policy.domains, *request["allow"])
            self.policy = replace(self.policy, domains=tuple(dict.fromkeys(domains)))
        return {
            "policy": self.policy.as_json(),
            "outside": self.policy.mode != "off" and self.outside is not None and self.attached_error is None,
            "error": self.attached_error,
            "servers": list(self.servers.now()),
        }

    # --- the loop ---

    def run(self) -> None:
        """Serve until the VM has ended."""
        path = f"{self.runtime}/net"
        with light.suppress(FileNotFoundError):
            os.unlink(path)
        self.control = light.Socket(light.AF_UNIX, light.SOCK_STREAM)
        self.control.bind(path)
        os.chmod(path, 0o600)
        self.control.listen(8)
        served = (
            (self.udp, self._on_udp),
            (self.tcp, self._on_tcp),
            (self.packets, self._on_packets),
            (self.routes, self._on_routes),
            (self.control, self._on_control),
        )
        handlers = {sock.fileno(): handler for sock, handler in served}
        for fd in (*handlers, self.alive):
            self._polled.register(fd, select.POLLIN)
        while True:
            self._look_outside()
            # What it looks at wakes it up, but for the times at which something is tried again, or given up.
            settled = self._ready and self.attached_error is None
            for fd, _ in self._polled.poll(None if settled else 500):
                if fd == self.alive:
                    return
                if fd in self._watched:
                    self._ended(fd)
                    continue
                handler = handlers.get(fd)
                if handler is not None:  # else it was forgotten a moment ago
                    with light.suppress(BlockingIOError):
                        handler()

    def end(self) -> None:
        """Take away what was started."""
        self.detach()
        with light.suppress(ProcessLookupError):
            os.kill(self.helper, light.SIGKILL)
        os.waitpid(self.helper, 0)
        with light.suppress(OSError):
            os.unlink(f"{self.runtime}/net")


def _start(argv: list[str], output: int) -> int:
    """Start a program that ends with this process; returns its process id. `subprocess` would take longer to import.

    It reads nothing, its words go to `output`, and it inherits nothing else.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        linux.end_with_parent(parent)
        light.signal(light.SIGPIPE, light.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, 1 << 20)
        os.chdir("/")
        os.execv(argv[0], argv)
    finally:
        os._exit(127)


def _say(word: str, why: str) -> None:
    os.write(1, f"{word} {' '.join(why.split())}\n".encode())


def _understood(answer: bytes) -> bool:
    """Whether the helper said yes. Raises OSError with what it could not do."""
    word, _, why = answer.decode().partition(" ")
    if word not in ("yes", "no"):
        raise OSError(0, why or "the helper ended")
    return word == "yes"


def prepare(library: str) -> None:
    """Have the library of the packet filter in memory, before anybody is known to need it."""
    inside.load(library)


def main() -> None:
    """`guard USER_FD NET_FD ALIVE_FD`: settings on standard input; it says a line, `ready` or `failed`, and why."""
    user, net, alive = map(int, sys.argv[-3:])
    settings = marshal.load(sys.stdin.buffer)  # noqa: S302 (of watch.Watch, which started it)
    os.umask(0o077)
    guard = Guard(settings, user, net, alive)
    try:
        guard.enter()
    except OSError as error:
        _say("failed", error.strerror or str(error))
        sys.exit(1)
    light.signal(light.SIGTERM, lambda *_: sys.exit(0))
    try:
        guard.run()
    finally:
        guard.end()
        os._exit(0)  # the interpreter's own end takes a while, and somebody may wait for ours
