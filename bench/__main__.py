"""`make bench`: what a user waits for, each beside the least that it could take.

Seconds drift from machine to machine; the ratios of one run hold. What is compared is measured in turn (A B A B …),
and the medians are shown, of ratios those of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import bare, home, mounts, net, restore, seed, share
from bench.home import MEMORY_MIB, VCPUS, Home
from nixbox.network import policy
from nixbox.plan.model import Accelerator

ROUNDS = 5
QUICK_ROUNDS = 15  # of what takes milliseconds
LONG_ROUNDS = 3  # of what takes many seconds
FORKS = 8
IDLE_S = 10.0
TRUE = ("run", "--no-tty", "--", "true")


class Bench:
    """One run: a home, and the rows of the table."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.nixbox = home.nixbox
        self.rows: list[tuple[str, str, str, str, str]] = []

    def row(self, what: str, value: str, beside: str = "", ratio: str = "", target: str = "") -> None:
        """Keep a row, and say it at once: a long run shows that it lives."""
        self.rows.append((what, value, beside, ratio, target))
        print(f"… {what}: {value}", *filter(None, (beside, ratio)), sep="  ", file=sys.stderr)

    def up(self) -> None:
        """A machine that was restored from the template, which is there afterwards."""
        self.home.up("restored")

    def rm(self, *names: str) -> None:
        """Remove machines; without a name the workspace's own."""
        for name in names or ("bench",):
            self.nixbox("rm", "--yes", name)


def timed(work: Callable[[], object]) -> float:
    """Seconds of wall time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median(values: Iterable[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def ms(seconds: float) -> str:
    """`12 ms`."""
    return f"{seconds * 1000:.0f} ms"


# --- images ---


def build(bench: Bench) -> None:
    """The first image from nothing (empty store, empty cache), beside mmdebstrap alone on the same set."""
    bench.home.forget_images()
    seconds = timed(lambda: bench.nixbox("build"))
    lock = json.loads((bench.home.workspace / ".nixbox" / "nixbox.lock").read_text())
    mmdebstrap = shutil.which("mmdebstrap")
    beside, ratio = "mmdebstrap is not installed", ""
    if mmdebstrap and os.getuid() == 0:
        raw = timed(lambda: raw_mmdebstrap(bench, mmdebstrap, lock))
        beside, ratio = f"mmdebstrap {raw:.1f} s", f"{seconds / raw:.2f}×"
    count = len(lock["base_packages"]) + len(lock["tools"]) + 2
    bench.row(f"first image build, {count} packages, cold", f"{seconds:.1f} s", beside, ratio, "≤ 90 s")


def raw_mmdebstrap(bench: Bench, program: str, lock: dict[str, list[dict[str, str]]]) -> None:
    """mmdebstrap as a person would call it, with the same packages, downloads included."""
    from nixbox.image import apt

    names = ",".join(package["name"] for package in lock["base_packages"])
    mirrors = apt.mirrors(None, None)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources = [f"deb [signed-by={keyring}] {mirrors.debian} trixie main"]
    sources.append(f"deb [signed-by={keyring}] {mirrors.debian} trixie-updates main")
    if mirrors.security:
        sources.append(f"deb [signed-by={keyring}] {mirrors.security} trixie-security main")
    target = bench.home.path / "raw.tar"
    argv = [program, "--variant=essential", f"--include={names}", "--aptopt=APT::Install-Recommends false"]
    bench.home.call([*argv, "trixie", str(target), *sources])
    target.unlink()


def no_op(bench: Bench) -> None:
    """`nixbox build` with nothing to do, and the image's size."""
    image = bench.home.image()
    seconds = median(timed(lambda: bench.nixbox("build")) for _ in range(QUICK_ROUNDS))
    bench.row("nixbox build, nothing to do", ms(seconds), "", "", "≤ 500 ms")
    rows = json.loads(bench.nixbox("image", "list", "--json"))
    size = next(row["size_bytes"] for row in rows if row["path"] == str(image))
    root = store_file(image, "root.img").stat().st_size
    bench.row("image", f"{size / 1e6:.0f} MB", f"of which root {root / 1e6:.0f} MB")


def store_file(image: Path, name: str) -> Path:
    """A file of an image, wherever the store is."""
    from nixbox.image import store

    return store.physical(image / name)


# --- from nothing to the first command ---


def save(bench: Bench) -> None:
    """The first `up`, which makes the template, and the part of it that saves the guest."""
    bench.home.image()
    whole, saving = [], []
    for _ in range(LONG_ROUNDS):
        bench.nixbox("template", "gc", "--all")
        begun = time.perf_counter()
        done = bench.home.up("restored")
        whole.append(time.perf_counter() - begun)
        if not done["made"]:
            raise SystemExit("the template was there already")
        saving.append(done["phases"]["save"])
        bench.rm()
    bench.row("first up of an image: makes the template", f"{median(whole):.2f} s")
    bench.row("saving it, both stages", ms(median(saving)), "", "", "≤ 1 s")


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds to the exit of the first command, each start once; `restored` is the bare one."""

    cold: float
    bare_cold: float
    new: float
    ephemeral: float
    restored: restore.Times

    @property
    def least(self) -> float:
        """A bare restore up to `ready`, and one connection."""
        return self.restored.ready + self.restored.dropbear


def start(bench: Bench) -> None:
    """A new machine to its first command's exit: booted, restored, for one command; beside a bare QEMU."""
    image = bench.home.image()
    bench.up()  # makes the template, and warms the page cache and the KVM probe's
    accelerator: Accelerator = bench.home.status()["accelerator"]
    bench.rm()

    def first_command(how: str, *args: str) -> float:
        def work() -> None:
            bench.home.up(how, *args)
            bench.nixbox(*TRUE)

        seconds = timed(work)
        bench.rm()
        return seconds

    def one_round() -> Round:
        return Round(
            cold=first_command("booted", "--cold"),
            bare_cold=bare_cold(bench, image, accelerator),
            new=first_command("restored"),
            restored=bare_restore(bench, image),
            ephemeral=timed(lambda: bench.nixbox("run", "--ephemeral", *TRUE[1:])),
        )

    rounds = [one_round() for _ in range(ROUNDS)]
    cold, new = median(r.cold for r in rounds), median(r.new for r in rounds)
    bench.row(
        f"cold boot to first command ({accelerator})",
        f"{cold:.2f} s",
        f"bare QEMU {median(r.bare_cold for r in rounds):.2f} s",
        f"{median(r.cold / r.bare_cold for r in rounds):.2f}×",
        "≤ 1.3×",
    )
    running, ready, dropbear, openssh = (
        median(getattr(r.restored, name) for r in rounds) for name in ("running", "ready", "dropbear", "openssh")
    )
    bench.row("bare restore to ready", ms(ready), f"to running {ms(running)}")
    bench.row("one SSH handshake: dropbear", ms(dropbear), f"OpenSSH by TCP {ms(openssh)}")
    faster = median(r.cold / r.new for r in rounds)
    bench.row(
        "new machine to first command", f"{new:.2f} s", f"cold {cold:.2f} s", f"{faster:.1f}×", "≤ 1.0 s, ≥ 6× faster"
    )
    bench.row(
        "new machine to first command",
        f"{new:.2f} s",
        f"bare restore {ms(ready)} + SSH {ms(dropbear)}",
        f"{median(r.new / r.least for r in rounds):.2f}×",
        "≤ 3×",
    )
    bench.row("nixbox run --ephemeral -- true", f"{median(r.ephemeral for r in rounds):.2f} s")


def bare_cold(bench: Bench, image: Path, accelerator: Accelerator) -> float:
    """Seconds of a cold boot without nixbox."""
    with tempfile.TemporaryDirectory(dir=bench.home.path) as work:
        guest = bare.ColdGuest(Path(work), image, vcpus=VCPUS, memory_mib=MEMORY_MIB, accelerator=accelerator)
        try:
            return timed(guest.first_command)
        finally:
            guest.bare.end()


def bare_restore(bench: Bench, image: Path) -> restore.Times:
    """A restore without nixbox."""
    with tempfile.TemporaryDirectory(dir=bench.home.path) as work:
        return restore.restore(Path(work), image)


# --- a machine that is there ---


def running(bench: Bench) -> None:
    """What each command costs on a machine that is up."""
    bench.up()
    config = bench.home.workspace / ".nixbox" / "machines" / "bench" / "ssh" / "exec"
    ssh = ["ssh", "-F", str(config), "bench", "true"]

    def one_round() -> tuple[float, float]:
        by_nixbox = timed(lambda: bench.nixbox(*TRUE))
        return by_nixbox, timed(lambda: bench.home.call(ssh))

    rounds = [one_round() for _ in range(QUICK_ROUNDS)]
    a, b = median(x for x, _ in rounds), median(y for _, y in rounds)
    bench.row(
        "nixbox run -- true",
        ms(a),
        f"ssh … true, same connection {ms(b)}",
        f"{median(x / y for x, y in rounds):.2f}×",
        f"{(a - b) * 1000:+.0f} ms (≤ +150 ms)",
    )
    status = median(timed(lambda: bench.nixbox("status")) for _ in range(QUICK_ROUNDS))
    bench.row("nixbox status", ms(status), "", "", "≤ 200 ms")
    bench.row("idle machine", f"{idle_percent(bench):.1f} % of a CPU")
    bench.rm()


def idle_percent(bench: Bench) -> float:
    """CPU time of an idle machine's QEMU, in percent of one CPU."""
    pid = bench.home.status()["pid"]
    time.sleep(2)  # what the last command has set off
    before = cpu_seconds(pid)
    seconds = timed(lambda: time.sleep(IDLE_S))
    return 100 * (cpu_seconds(pid) - before) / seconds


def cpu_seconds(pid: int) -> float:
    """What a process has used of the CPUs: utime and stime of proc(5)."""
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def again(bench: Bench) -> None:
    """Down and up again, suspend and up again, of one machine."""
    bench.up()

    def first_command(how: str) -> float:
        def work() -> None:
            bench.home.up(how)
            bench.nixbox(*TRUE)

        return timed(work)

    def one_round() -> tuple[float, float, float, float]:
        down = timed(lambda: bench.nixbox("down"))
        existing = first_command("restored")
        suspend = timed(lambda: bench.nixbox("suspend"))
        return down, existing, suspend, first_command("resumed")

    rounds = [one_round() for _ in range(ROUNDS)]
    down, existing, suspend, resumed = (median(r[i] for r in rounds) for i in range(4))
    bench.row("nixbox down", ms(down))
    bench.row("up of an existing machine to first command", f"{existing:.2f} s")
    bench.row("nixbox suspend", f"{suspend:.2f} s")
    bench.row("resume to first command", f"{resumed:.2f} s")
    bench.rm()


# --- many machines ---


def fork(bench: Bench) -> None:
    """Copies of a running machine."""
    bench.up()
    bench.nixbox(*TRUE)
    many(bench, "bench", f"fork of {FORKS}", "each fork")
    bench.rm()


def fresh(bench: Bench) -> None:
    """As many new machines, from the template."""
    bench.up()  # makes the template
    bench.rm()
    many(bench, "fresh", f"{FORKS} new machines", "each new machine")


def many(bench: Bench, name: str, what: str, each: str) -> None:
    """`nixbox fork NAME`: the time until every machine has run a command, and what they take of the memory."""
    begun = time.perf_counter()
    made = json.loads(bench.nixbox("fork", name, "--count", str(FORKS), "--json"))
    returned = time.perf_counter() - begun
    names = [machine["name"] for machine in made]
    commands = [bench.home.begin([*home.NIXBOX, "run", "-m", name, *TRUE[1:]]) for name in names]
    for command in commands:
        bench.home.finish(command)
    seconds = time.perf_counter() - begun
    bench.row(f"{what}, until all have run a command", f"{seconds:.2f} s", f"fork itself {returned:.2f} s")
    found = [bench.home.status(name) for name in names]
    own = [machine["memory"]["own"] / 1e6 for machine in found]
    bench.row(f"memory of {each}'s own", f"{median(own):.0f} MB", f"{min(own):.0f} to {max(own):.0f} MB")
    shares = [share.of(machine["pid"], machine["memory_mib"]) for machine in found]
    pages = shares[0].touched_pages * os.sysconf("SC_PAGE_SIZE")
    least = min(one.shared for one in shares)
    bench.row(
        f"of what it began with, {each} shares",
        f"{median(one.shared for one in shares):.1%}",
        f"of {pages / 1e6:.0f} MB, the least {least:.1%}",
        "",
        "≥ 70 %",
    )
    bench.rm(*names)


# --- the network ---


def network(bench: Bench) -> None:
    """What a guest's network carries in `filtered` and `open`, beside QEMU's own user network."""
    image = bench.home.image()
    bench.up()  # makes the template
    accelerator: Accelerator = bench.home.status()["accelerator"]
    bench.rm()
    with (
        net.world(bench.home) as place,
        net.user_network(bench.home, place, image, accelerator) as by_qemu,
    ):
        found = {}
        for mode in ("open", "filtered"):
            with net.machine(bench.home, place, mode) as by_nixbox:
                found[mode] = [(by_nixbox(), by_qemu()) for _ in range(LONG_ROUNDS)]
                if mode == "filtered":
                    guarded, direct = net.dns_ms(place, bench.home.status()["pid"], policy.GATEWAY)
    for mode, rounds in found.items():
        for what, name, unit in (("download", "download", 1e6), ("requests", "requests", 1.0)):
            ours = median(getattr(a, name) for a, _ in rounds) / unit
            theirs = median(getattr(b, name) for _, b in rounds) / unit
            ratio = median(getattr(a, name) / getattr(b, name) for a, b in rounds)
            shown = "MB/s" if unit > 1 else "/s"
            bench.row(
                f"{what}, {mode}",
                f"{ours:.0f} {shown}",
                f"bare slirp {theirs:.0f} {shown}",
                f"{ratio:.2f}×",
                "≥ 0.8×",
            )
    bench.row("a name, through the guard", f"{guarded:.2f} ms", f"asked directly {direct:.2f} ms")


# --- mounts ---


def mounted(bench: Bench) -> None:
    """A directory of the host in a guest: what it does to a start, and how fast it is beside the guest's own disk."""
    bench.home.image()
    bench.up()  # makes the template
    bench.rm()
    config = bench.home.workspace / ".nixbox" / "config.toml"

    def first_command(text: str) -> float:
        config.write_text(text)

        def work() -> None:
            bench.home.up("restored")
            bench.nixbox(*TRUE)

        seconds = timed(work)
        bench.rm()
        return seconds

    starts = [(first_command(mounts.mounting()), first_command(home.CONFIG)) for _ in range(ROUNDS)]
    bench.row(
        "new machine with a mount, to first command",
        f"{median(a for a, _ in starts):.2f} s",
        f"without {median(b for _, b in starts):.2f} s",
        f"{median(a / b for a, b in starts):.2f}×",
    )
    with mounts.machine(bench.home):
        rounds = [
            (mounts.measure(bench.home, "/home/nixbox/workspace"), mounts.measure(bench.home, "/home/nixbox"))
            for _ in range(LONG_ROUNDS)
        ]
    size = f"{mounts.LARGE_MB} MB"
    for what, name in (
        (f"untar {mounts.FILES} small files", "untar"),
        (f"write {size}", "write"),
        (f"read {size}", "read"),
    ):
        ours, theirs = median(getattr(a, name) for a, _ in rounds), median(getattr(b, name) for _, b in rounds)
        ratio = median(getattr(b, name) / getattr(a, name) for a, b in rounds)
        bench.row(f"{what}, mounted", f"{ours:.2f} s", f"overlay disk {theirs:.2f} s", f"{ratio:.2f}× as fast")


# --- seeds ---


def seeding(bench: Bench) -> None:
    """A large file and many small ones into a guest, beside other ways to copy the same."""
    with seed.machine(bench.home) as place:
        place.raw(sync=False)  # whoever comes first is the first to touch the guest's memory
        large = [(place.seed(place.large), place.raw(sync=False), place.raw(sync=True)) for _ in range(LONG_ROUNDS)]
        ours = median(a for a, _, _ in large)
        for i, what, target in ((1, "ssh cat >file", "≥ 0.9×"), (2, "the same, and sync", "")):
            beside, ratio = median(r[i] for r in large), median(r[i] / r[0] for r in large)
            words = f"{what} {beside:.2f} s"
            bench.row(f"seed {seed.LARGE_MB} MB, one file", f"{ours:.2f} s", words, f"{ratio:.2f}×", target)
        bench.row("is a seed done?", ms(median(place.pending(QUICK_ROUNDS))))
        many_small(bench, place)


def many_small(bench: Bench, place: seed.Place) -> None:
    """The part of `seeding` that is bound by the guest's file system."""
    what = f"seed {seed.FILES} small files"
    if seed.have_rsync():
        ways = ("config", "exec")
        rounds = [(place.seed(place.small), *map(place.rsync, ways)) for _ in range(LONG_ROUNDS)]
    else:
        rounds = [(place.seed(place.small), 0.0, 0.0) for _ in range(LONG_ROUNDS)]
        bench.row("rsync -a", "not installed")
    ours = median(r[0] for r in rounds)
    for i, over, target in ((1, "", "≥ 1.5×"), (2, ", same connection", "")) if seed.have_rsync() else ():
        beside, ratio = median(r[i] for r in rounds), median(r[i] / r[0] for r in rounds)
        bench.row(what, f"{ours:.1f} s", f"rsync -a{over} {beside:.1f} s", f"{ratio:.1f}×", target)
    # It takes many minutes: that it is slower than five times as long says enough.
    scp = place.scp(5 * ours)
    over = "over " if scp is None else ""
    taken = 5 * ours if scp is None else scp
    bench.row(what, f"{ours:.1f} s", f"scp -r {over}{taken:.1f} s", f"{over}{taken / ours:.1f}×", "≥ 3×")


PARTS: dict[str, Callable[[Bench], None]] = {
    "build": build,
    "no-op": no_op,
    "save": save,
    "start": start,
    "running": running,
    "again": again,
    "fork": fork,
    "fresh": fresh,
    "network": network,
    "mounts": mounted,
    "seed": seeding,
}


def table(rows: Sequence[tuple[str, str, str, str, str]]) -> None:
    """Print the rows as a Markdown table."""
    header = ("what", "measured", "beside", "ratio", "target")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(5)]
    for row in (header, tuple("-" * width for width in widths), *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def main() -> None:
    """Measure everything, or some of it, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--home", type=Path, help="work here and keep image and templates for the next call")
    options = parser.parse_args()
    with home.home(options.home) as place:
        bench = Bench(place)
        for name, part in PARTS.items():
            if name in (options.only or PARTS):
                part(bench)
        table(bench.rows)


if __name__ == "__main__":
    main()
