"""`make bench-kvm`: starts where KVM runs guests, in the emulated KVM host of tests/kvm; one run, one table.

Seconds there are those of a host some twenty times slower than a real one, for Python and for guests alike: only the
ratios of one run say something. Rounds are interleaved, medians are shown, of ratios those of the rounds. "Whole" is
from a process's start to the exit of the first command; "start" is without Python's own start, the config and the
image's checks: for nixbox the phases of `up --json` from the disk on, for others what their own calls take. The box
has its files by 9p; what the first round opened is in its memory in the others (bench/resident.py).
"""

from __future__ import annotations

import argparse
import compileall
import json
import marshal
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from bench import bare, floor_krun, home, kvm_peers, probe
from bench.home import Home
from nixbox.image import store
from nixbox.machine import krun, libkrun
from tests.kvm import box as boxes

CHECKOUT = Path(__file__).resolve().parents[1]
VCPUS, MEMORY_MIB, DISK_MIB = 1, 320, 1024
CONFIG = (
    f'name = "bench"\nmounts = []\n[resources]\nvcpus = {VCPUS}\nmemory = "{MEMORY_MIB}MiB"\n'
    f'disk = "{DISK_MIB}MiB"\n[machine]\nbackend = "krun"\n'
)
ROUNDS = 3
PROBES = 1000
LIMIT_S = 300.0
PROBE_LIMIT_S = 1.0  # on the average; in the box one takes 0.15 s on a quiet day
_BEFORE = ("config", "lock", "build", "prepare")  # phases of `up` that are no part of the machine's start
_NOTED = "/tmp/opened"  # in the box
# As nixbox.machine.overlay makes it; /tmp is a tmpfs in the box.
_DISK = (
    f"rm -f /tmp/floor; truncate -s {DISK_MIB}M /tmp/floor; mke2fs -q -t ext4 -F -m 0 -L nixbox-overlay "
    "-E lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0 /tmp/floor"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one start; `phases` are its parts, by name."""

    whole: float
    start: float
    phases: dict[str, float] = field(default_factory=dict)


class Host:
    """A box with nixbox and the home that was prepared outside of it."""

    def __init__(self, box: boxes.Box, home: Home) -> None:
        self.box, self.home = box, home
        kept = ("HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "NIX_REMOTE", "PATH")
        self.env = {name: os.environ[name] for name in kept} | {"PYTHONPATH": str(CHECKOUT), "LC_ALL": "C.UTF-8"}

    def call(self, argv: list[str], timeout_s: float = LIMIT_S) -> boxes.Done:
        """Run a program in the workspace. Raises SystemExit when it fails."""
        done = self.box.run(argv, cwd=str(self.home.workspace), env=self.env, timeout_s=timeout_s)
        if done.code != 0:
            raise SystemExit(f"{argv}: {done.code}\n{done.stdout}\n{done.stderr}")
        return done

    def nixbox(self, *args: str) -> boxes.Done:
        """Run a nixbox command."""
        return self.call([*home.NIXBOX, *args])

    def up(self, how: str, *args: str) -> Sample:
        """A new machine and its first command; the machine is gone afterwards."""
        up = self.nixbox("up", "--json", *args)
        done = json.loads(up.stdout)
        if (done["how"], done["accelerator"]) != (how, "kvm"):
            raise SystemExit(f"the machine was to be {how} with KVM: {done}")
        first = self.nixbox("run", "--no-tty", "--", "true")
        self.nixbox("rm", "--yes", "bench")
        phases = {name: s for name, s in done["phases"].items() if name not in _BEFORE} | {"up": up.seconds}
        return Sample(up.seconds + first.seconds, sum(phases.values()) - up.seconds, phases)

    def one(self) -> Sample:
        """A command on a machine of its own, which is gone afterwards, by one program."""
        seconds = self.nixbox("run", "--ephemeral", "--no-tty", "--", "true").seconds
        return Sample(seconds, seconds)

    def floor(self) -> Sample:
        """The same boot by bench/floor_krun.py; without a first command."""
        self.call(["sh", "-euc", _DISK])
        settings = str(self.home.path / "floor" / "settings")
        said = self.call([sys.executable, "-I", "-S", floor_krun.__file__, settings]).stdout
        boot, ready = map(float, said.split())
        return Sample(ready, ready, {"boot": boot, "go": ready - boot})


@contextmanager
def resident(box: boxes.Box, apart_from: Path) -> Iterator[None]:
    """Whatever the body opens in the box, but for what lies in a directory, is in its memory from then on."""
    env = {"PYTHONPATH": str(CHECKOUT)}
    program = [sys.executable, "-m", "bench.resident", _NOTED]
    noting = box.run(program, env=env)
    if noting.code != 0:
        raise SystemExit(str(noting))
    yield
    ended = f"kill -TERM {noting.stdout.strip()}; until [ -e {_NOTED} ]; do sleep 0.1; done"
    done = box.run(["sh", "-euc", f"{ended}; {shlex.join([*program, str(apart_from)])}"], env=env)
    if done.code != 0:
        raise SystemExit(str(done))


def prepare_floor(directory: Path, image: Path) -> None:
    """Settings, keys and `go` for bench/floor_krun.py."""
    directory.mkdir(exist_ok=True)
    payload = bare.Bare(directory, "dev").go("boot", restored=False, image=image).pack()
    settings = {
        "modules": [str(libkrun.compiled()), libkrun.cffi_directory()],
        "library": str(libkrun.find()),
        "vcpus": VCPUS,
        "memory_mib": MEMORY_MIB,
        "kernel": str(store.physical(image / krun.Krun.kernel)),
        "boot": str(store.physical(image / krun.Krun.initrd)),
        "root": str(store.physical(image / "root.img")),
        "overlay": "/tmp/floor",
        "cmdline": " ".join(krun.KERNEL_ARGS),
        "go": f"go {len(payload)} {payload.count(10)}\n{payload.decode()}",
    }
    (directory / "settings").write_bytes(marshal.dumps(settings))


@contextmanager
def saved_box(place: Home, *, counting: bool = False) -> Iterator[boxes.Saved]:
    """A KVM host to go on from, of the same lock as the image."""
    directory = place.path / "box"
    directory.mkdir(exist_ok=True)
    lock = json.loads((place.workspace / ".nixbox" / "nixbox.lock").read_text())
    lock.pop("krun", None)
    kernel, initrd = boxes.build(boxes.lock_of(json.dumps(lock)), directory)
    try:
        yield boxes.save(kernel, initrd, directory, counting=counting)
    finally:
        shutil.rmtree(directory)


# --- the table ---

KRUN, QEMU = "nixbox, krun, cold", "nixbox, qemu/kvm, cold"
RESTORED = {QEMU: "nixbox, qemu/kvm, from the template", KRUN: "nixbox, krun, from the template"}
FLOOR = "bare libkrun, to `ready`"
ONE = "nixbox, krun, `run --ephemeral`"  # one program, as others' are: from the template to the machine's end


def measure(
    contestants: dict[str, Callable[[], Sample]], first: AbstractContextManager[object]
) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """Every contestant in turn: what was measured, and why the others were not.

    Two rounds fill the caches, `first` around the first of them.
    """
    found: dict[str, list[Sample]] = {name: [] for name in contestants}
    failed: dict[str, str] = {}
    for number in range(-1, ROUNDS + 1):
        with first if number < 0 else nullcontext():
            for name, start in contestants.items():
                if name in failed:
                    continue
                try:
                    sample = start()
                except kvm_peers.CannotRun as error:
                    failed[name] = str(error)
                    print(f"… {number} {name}: {error}", file=sys.stderr)
                    continue
                print(f"… {number} {name}: {sample}", file=sys.stderr)
                if number > 0:
                    found[name].append(sample)
    return {name: samples for name, samples in found.items() if name not in failed}, failed


def table(found: dict[str, list[Sample]], failed: dict[str, str]) -> None:
    """Print every start and its ratio to the fastest cold boot, as a Markdown table."""
    cold = [name for name in found if name not in (FLOOR, ONE, *RESTORED.values())]

    def cells(name: str, of: Callable[[Sample], float]) -> str:
        value = statistics.median(map(of, found[name]))
        fastest = min(statistics.median(map(of, found[other])) for other in cold)
        return f"{value:.2f} s | {value / fastest:.2f}×"

    print("| | whole | to the fastest cold boot | start | to the fastest cold boot |\n| - | - | - | - | - |")
    for name in found:
        whole = "— | —" if name == FLOOR else cells(name, lambda sample: sample.whole)
        start = "— | —" if name == ONE else cells(name, lambda sample: sample.start)
        print(f"| {name} | {whole} | {start} |")
    for name, why in failed.items():
        print(f"| {name} | cannot be measured here: {why} | | | |")


def ratios(found: dict[str, list[Sample]]) -> None:
    """Print what the targets are about, and where the time went."""

    def row(what: str, one: str, of: Callable[[Sample], float], other: str, by: Callable[[Sample], float]) -> None:
        rounds = [of(a) / by(b) for a, b in zip(found[one], found[other], strict=True)]
        print(f"| {what} | {statistics.median(rounds):.2f}× | {min(rounds):.2f} to {max(rounds):.2f} |")

    def boot_and_go(sample: Sample) -> float:
        return sample.phases["boot"] + sample.phases["go"]

    print("\n| ratio | median | rounds |\n| - | - | - |")
    row("krun to its floor, boot + go (target ≤ 1.2)", KRUN, boot_and_go, FLOOR, boot_and_go)
    row("… boot alone", KRUN, lambda s: s.phases["boot"], FLOOR, lambda s: s.phases["boot"])
    row("… go alone", KRUN, lambda s: s.phases["go"], FLOOR, lambda s: s.phases["go"])
    row("… its whole `nixbox up`", KRUN, lambda s: s.phases["up"], FLOOR, lambda s: s.start)
    fastest = min((KRUN, QEMU), key=lambda name: statistics.median(s.start for s in found[name]))
    for restored in RESTORED.values():
        row(f"{fastest}, to {restored}, start (target ≥ 5)", fastest, lambda s: s.start, restored, lambda s: s.start)
    for name, restored in RESTORED.items():
        row(f"{name}, to its own template, start", name, lambda s: s.start, restored, lambda s: s.start)
        row("… whole", name, lambda s: s.whole, restored, lambda s: s.whole)
    for name in (KRUN, FLOOR, QEMU, *RESTORED.values()):
        parts = {part: statistics.median(s.phases[part] for s in found[name]) for part in found[name][0].phases}
        print(f"\n{name}: " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items()))


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.kvm", description=__doc__)
    parser.add_argument("--home", type=Path, help="work here and keep the image for the next call")
    parser.add_argument("--quick", action="store_true", help="nixbox and its floor alone: no peers, no probe")
    parser.add_argument("--instructions", action="store_true", help="the box's clock counts instructions")
    arguments = parser.parse_args()
    compileall.compile_dir(CHECKOUT / "nixbox", quiet=1)  # as an installed program's modules are
    with home.home(arguments.home) as place, ExitStack() as undo:
        (place.workspace / ".nixbox" / "config.toml").write_text(CONFIG)
        image = place.image()
        prepare_floor(place.path / "floor", image)
        saved = undo.enter_context(saved_box(place, counting=arguments.instructions))
        host = Host(undo.enter_context(boxes.restored(saved)), place)
        measured = [host.box]
        contestants = {
            KRUN: lambda: host.up("booted", "--cold", "--backend", "krun"),
            FLOOR: host.floor,
            QEMU: lambda: host.up("booted", "--cold", "--backend", "qemu"),
            RESTORED[QEMU]: lambda: host.up("restored", "--backend", "qemu"),
            RESTORED[KRUN]: lambda: host.up("restored", "--backend", "krun"),
        }
        if not arguments.instructions:  # QEMU 7.2 gives its guest an interrupt twice then, and that hangs
            contestants[ONE] = host.one
        if not arguments.quick:
            peers = place.path / "peers"
            kvm_peers.prepare(peers, store.physical(image / "root.img"))
            smol, msb = (undo.enter_context(boxes.restored(saved)) for _ in range(2))
            measured += [smol, msb]
            contestants |= {
                "smolmachines": lambda: Sample(*kvm_peers.smolmachines(smol, peers, VCPUS, MEMORY_MIB)),
                "microsandbox": lambda: Sample(*kvm_peers.microsandbox(msb, peers, VCPUS, MEMORY_MIB)),
            }
        first = ExitStack()
        for box in measured:
            first.enter_context(resident(box, place.store))
        found, failed = measure(contestants, first)
        table(found, failed)  # before what may still go wrong
        ratios(found)
        if not arguments.quick:
            if Path("/dev/kvm").exists():
                print(f"\nKVM probe, {PROBES} runs here: {probe.runs(PROBES)}", flush=True)
            said = host.call(
                [sys.executable, "-m", "bench.probe", str(PROBES)], timeout_s=PROBES * PROBE_LIMIT_S
            ).stdout
            print(f"\nKVM probe, {PROBES} runs in the box: {json.loads(said)}")


if __name__ == "__main__":
    main()
