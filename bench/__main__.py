"""`make bench`: what a user waits for, each beside the least that it could take.

Seconds drift from machine to machine; the ratios of one run hold. Pairs are measured in turn (A B A B …) and
the median of each is shown.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.bare import BareGuest

NIXBOX = [sys.executable, "-m", "nixbox"]
CONFIG = 'name = "bench"\nmounts = []\n[resources]\nvcpus = 2\nmemory = "512MiB"\ndisk = "2GiB"\n'
ROUNDS = 5


class Bench:
    """One run: a clean home, a workspace, and the rows of the table."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.workspace = home / "bench"
        (self.workspace / ".nixbox").mkdir(parents=True)
        (self.workspace / ".nixbox" / "config.toml").write_text(CONFIG)
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "NIXBOX_"))}
        self.env = keep | {"HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run")}
        (home / "run").mkdir(mode=0o700)
        self.rows: list[tuple[str, str, str, str, str]] = []

    def nixbox(self, *args: str, **env: str) -> str:
        """Run a nixbox command in the workspace; returns its stdout."""
        done = subprocess.run(
            [*NIXBOX, *args], cwd=self.workspace, env=self.env | env, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"nixbox {' '.join(args)}: {done.returncode}\n{done.stderr}")
        return done.stdout

    def row(self, what: str, value: str, beside: str = "", ratio: str = "", target: str = "") -> None:
        """Keep a row, and say it at once: a long run shows that it lives."""
        self.rows.append((what, value, beside, ratio, target))
        print(f"… {what}: {value} {beside} {ratio}", file=sys.stderr)


def timed(work: Callable[[], object]) -> float:
    """Seconds of wall time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pairs(a: Callable[[], float], b: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """The medians of two measurements taken in turn, and the median of their ratios."""
    found = [(a(), b()) for _ in range(rounds)]
    ratios = [x / y for x, y in found]
    return statistics.median(x for x, _ in found), statistics.median(y for _, y in found), statistics.median(ratios)


def first_build(bench: Bench) -> None:
    """The first image from nothing (empty store, empty cache), beside mmdebstrap alone on the same set."""
    store, cache = bench.home / "store", bench.home / "cache"
    seconds = timed(lambda: bench.nixbox("build", NIX_REMOTE=str(store), XDG_CACHE_HOME=str(cache)))
    lock = json.loads((bench.workspace / ".nixbox" / "nixbox.lock").read_text())
    mmdebstrap = shutil.which("mmdebstrap")
    beside, ratio = "mmdebstrap is not installed", ""
    if mmdebstrap and os.getuid() == 0:
        raw = timed(lambda: raw_mmdebstrap(bench, mmdebstrap, lock))
        beside, ratio = f"mmdebstrap {raw:.1f} s", f"{seconds / raw:.2f}×"
    count = len(lock["base_packages"]) + len(lock["tools"]) + 2
    bench.row(f"first image build, {count} packages, cold", f"{seconds:.1f} s", beside, ratio, "≤ 90 s")
    subprocess.run(["chmod", "-R", "u+w", str(store)], check=True)
    shutil.rmtree(store)
    shutil.rmtree(cache)


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
    target = bench.home / "raw.tar"
    argv = [program, "--variant=essential", f"--include={names}", "--aptopt=APT::Install-Recommends false"]
    subprocess.run([*argv, "trixie", str(target), *sources], check=True, capture_output=True)
    target.unlink()


def cold_up(bench: Bench) -> None:
    """A new machine to its first command's exit, beside a bare QEMU with the same files to the same sshd."""
    image = Path(bench.nixbox("build").strip())

    def up() -> float:
        seconds = timed(lambda: (bench.nixbox("up"), bench.nixbox("run", "--no-tty", "--", "true")))
        bench.nixbox("rm", "--yes")
        return seconds

    def bare() -> float:
        with tempfile.TemporaryDirectory(dir=bench.home) as work:
            guest = BareGuest(Path(work), image)
            try:
                return timed(guest.first_command)
            finally:
                guest.end()

    up()  # warms the page cache and the KVM probe's
    a, b, ratio = pairs(up, bare, ROUNDS)
    accelerator = "TCG"
    bench.row(
        f"cold up to first command, {accelerator}", f"{a:.2f} s", f"bare QEMU {b:.2f} s", f"{ratio:.2f}×", "≤ 1.3×"
    )


def running_machine(bench: Bench) -> None:
    """What each command costs on a machine that is up."""
    bench.nixbox("up")
    config = bench.home / "ssh_config"
    config.write_text(bench.nixbox("ssh-config"))
    ssh = ["ssh", "-F", str(config), "bench", "true"]

    def by_ssh() -> float:
        return timed(lambda: subprocess.run(ssh, check=True, stdin=subprocess.DEVNULL))

    def by_nixbox() -> float:
        return timed(lambda: bench.nixbox("run", "--no-tty", "--", "true"))

    a, b, ratio = pairs(by_nixbox, by_ssh, 15)
    bench.row(
        "nixbox run -- true", f"{a * 1000:.0f} ms", f"ssh … true {b * 1000:.0f} ms", f"{ratio:.2f}×",
        f"{(a - b) * 1000:+.0f} ms (≤ +150 ms)",
    )  # fmt: skip
    status = statistics.median(timed(lambda: bench.nixbox("status")) for _ in range(15))
    bench.row("nixbox status", f"{status * 1000:.0f} ms", "", "", "≤ 200 ms")
    down = timed(lambda: bench.nixbox("down"))
    bench.row("nixbox down", f"{down * 1000:.0f} ms")
    again = timed(lambda: (bench.nixbox("up"), bench.nixbox("run", "--no-tty", "--", "true")))
    bench.row("up of an existing machine to first command", f"{again:.2f} s")
    bench.nixbox("rm", "--yes")


def no_op(bench: Bench) -> None:
    """`nixbox build` with nothing to do, and the image's size."""
    bench.nixbox("build")
    seconds = statistics.median(timed(lambda: bench.nixbox("build")) for _ in range(10))
    bench.row("nixbox build, nothing to do", f"{seconds * 1000:.0f} ms", "", "", "≤ 500 ms")
    rows = json.loads(bench.nixbox("image", "list", "--json"))
    size = max(row["size_bytes"] for row in rows)
    root = bench_file(rows[0]["path"], "root.squashfs").stat().st_size
    bench.row("image", f"{size / 1e6:.0f} MB", f"of which root {root / 1e6:.0f} MB")


def bench_file(image: str, name: str) -> Path:
    """A file of an image, wherever the store is."""
    from nixbox.image import store

    return store.physical(Path(image) / name)


def table(rows: Sequence[tuple[str, str, str, str, str]]) -> None:
    """Print the rows as a Markdown table."""
    header = ("what", "measured", "beside", "ratio", "target")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(5)]
    for row in (header, tuple("-" * width for width in widths), *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def main() -> None:
    """Measure everything, then print the table."""
    with ExitStack() as undo:
        home = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="nbx", ignore_cleanup_errors=True)))
        bench = Bench(home)
        first_build(bench)
        no_op(bench)
        cold_up(bench)
        running_machine(bench)
        table(bench.rows)


if __name__ == "__main__":
    main()
