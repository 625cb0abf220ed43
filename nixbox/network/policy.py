"""What a guest may reach, and the packet filter that holds it to that. Pure: values and text."""

from __future__ import annotations

from nixbox.plan.network import GUEST_ADDRESS, GUEST_SHELL_PORT, Policy

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Iterable

# The same in every machine: each has a network namespace of its own.
DEVICE = "tap0"
GATEWAY = "10.0.2.2"
GATEWAY_MAC = "02:00:00:00:00:02"
GUEST = GUEST_ADDRESS
PREFIX = 24
DNS_PORT = 53
LOG_GROUP = 1  # of nfnetlink_log, in the namespace

DEFAULT_PORTS = (80, 443)

# RFC 6890's special-purpose blocks that lie in somebody's own network, in the host or nowhere; 169.254/16 holds the
# addresses at which clouds hand out credentials. 192.0.2.0/24 and its like are for documents, and harm nobody.
PRIVATE = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3"),
)


_blocks: list[ipaddress.IPv4Network] = []


def _private() -> list[ipaddress.IPv4Network]:
    """PRIVATE's blocks, when an address is looked at: a start waits for who imports this, and looks at none."""
    if not _blocks:
        import ipaddress

        _blocks[:] = [ipaddress.IPv4Network(block) for block in PRIVATE]
    return _blocks


def resolves(policy: Policy, name: str) -> bool:
    """Whether the guest gets an answer for a domain name."""
    if policy.mode != "filtered":
        return policy.mode == "open"
    return any(covers(domain, name) for domain in policy.domains)


def admits(policy: Policy, address: str) -> bool:
    """Whether an answer may make this IPv4 address reachable."""
    return policy.allow_private or not is_private(address)


def plain(domain: str) -> str:
    """A domain of the config in the form that is compared: `*.Example.org` is `example.org`."""
    return domain.removeprefix("*.").rstrip(".").lower()


def covers(domain: str, name: str) -> bool:
    """Whether a name is the domain or lies below it: `example.org` covers `a.example.org`, not `notexample.org`."""
    domain, name = plain(domain), name.rstrip(".").lower()
    return name == domain or name.endswith(f".{domain}")


def is_private(address: str) -> bool:
    """Whether an IPv4 address is in somebody's own network and not in the Internet."""
    import ipaddress

    value = ipaddress.IPv4Address(address)
    return any(value in block for block in _private())


def ruleset(policy: Policy) -> str:
    """The filter of a machine's namespace, in nft(8)'s language.

    What is refused is refused at once (a reset, or an ICMP message) and logged, so that nobody waits for a time-out.
    Only IPv4 leaves: the guest has no other address. Nothing that lives in the namespace has a way out (`output`), a
    hypervisor that the guest has taken over included: only what the guest itself sends through its card is forwarded.
    """
    return f"""\
table inet nixbox
delete table inet nixbox
table inet nixbox {{
  set private {{
    type ipv4_addr
    flags interval
    elements = {{ {", ".join(PRIVATE)} }}
  }}
  set admitted {{
    type ipv4_addr
    flags timeout
    size 65535
  }}
  chain refuse {{
    limit rate 50/second burst 100 packets log group {LOG_GROUP} snaplen 128
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain input {{
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    iifname != "{DEVICE}" ct state established,related accept
    iifname != "{DEVICE}" drop
    ip saddr {GUEST} ip daddr {GATEWAY} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept
    ip saddr {GUEST} ip daddr {GATEWAY} tcp sport {GUEST_SHELL_PORT} ct state established accept
    goto refuse
  }}
  chain output {{
    type filter hook output priority 0; policy drop;
    oifname {{ "lo", "{DEVICE}" }} accept
  }}
  chain forward {{
    type filter hook forward priority 0; policy drop;
    ct state invalid drop
    iifname != "{DEVICE}" ct state established,related accept
    iifname != "{DEVICE}" drop
    oifname "{DEVICE}" drop
    ip saddr {GUEST} jump leaving
    goto refuse
  }}
  chain leaving {{
{_leaving(policy)}  }}
  chain translate {{
    type nat hook postrouting priority 100;
    oifname != {{ "lo", "{DEVICE}" }} masquerade
  }}
}}
"""


def _leaving(policy: Policy) -> str:
    """The rules for packets of the guest's own address on their way out; what they let through they accept."""
    rules = ["ct state established,related accept"]
    if policy.mode != "off" and not policy.allow_private:
        rules.append("ip daddr @private goto refuse")
    if policy.mode == "open":
        rules.append("accept")
    elif policy.mode == "filtered":
        ports = ", ".join(str(port) for port in sorted(set(policy.ports or DEFAULT_PORTS)))
        rules.append(f"ip daddr @admitted tcp dport {{ {ports} }} accept")
    return "".join(f"    {rule}\n" for rule in rules)


def admission(addresses: Iterable[tuple[str, int]]) -> str:
    """Let the guest connect to IPv4 addresses, each for some seconds from now on, in nft(8)'s language.

    One transaction: a set does not renew the time of an element that it has, so it goes and comes back.
    """
    text = []
    for address, seconds in addresses:
        import ipaddress

        element = f"element inet nixbox admitted {{ {ipaddress.IPv4Address(address)}"
        text += [
            f"add {element} timeout {seconds}s }}",
            f"delete {element} }}",
            f"add {element} timeout {seconds}s }}",
        ]
    return "\n".join(text)
