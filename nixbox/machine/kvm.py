"""Is /dev/kvm a KVM that runs guests? Ask it to run some, and time them.

A device that opens is not enough: a nested or software KVM may emulate every instruction. The probe runs
20,000 rounds of a two-instruction loop in a throw-away VM. The calls are those of
Documentation/virt/kvm/api.rst in Linux's source; cffi is imported by the child only.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path

from nixbox.errors import NixboxError
from nixbox.values import asdict, dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Never

WARM_UP_ROUNDS = 1_000  # takes the first faults on page tables and code
ROUNDS = 20_000  # that times are told for
# Measured, in ms: SVM emulated by QEMU 0.4-0.9 (hardware: far less), a software KVM (PVM) 11-31.
USABLE_BELOW_MS = 5.0
HOPELESS_FROM_MS = 2 * USABLE_BELOW_MS  # if five runs say so, it may be cached
# Of one run. Short ones, of which the best counts: a host that is emulated itself takes the milliseconds in which its
# own CPU belongs to others for the guest's.
SHORT_ROUNDS = ROUNDS // 4
RUNS, HOPELESS_RUNS = 6, 5
RUN_BUDGET_S = 0.04  # of CPU time, for each run
RUN_LIMIT_S = 1.0  # whatever else this host has to do meanwhile
START_LIMIT_S = 10.0  # for the child's interpreter, on a host as slow as one that is emulated itself
PROBE_LIMIT_S = 2.0  # from then on, to SIGKILL
# Where time ran out, which is no certain sign: an emulated host was seen to stand still for two seconds.
TRIES = 6
PATIENCE_S = 5.0  # the last try begins before
_REAP_S = 0.1

_NESTED_HINT = "use a host with hardware virtualisation; a virtual host must have nested virtualisation turned on"
_BUSY_HINT = "try again when this host is less busy"
_SLOW_HINT = f"{_BUSY_HINT}, or {_NESTED_HINT}"
_EXIT_HLT = 5
_EXIT_NAMES = {0: "UNKNOWN", 1: "EXCEPTION", 8: "SHUTDOWN", 9: "FAIL_ENTRY", 17: "INTERNAL_ERROR"}


class KvmState(Enum):
    """What a KVM device is good for."""

    USABLE = "usable"
    UNUSABLE = "unusable"  # present, but emulating or failing
    NO_PERMISSION = "no permission"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class KvmProbe:
    """The answer in words. `run_ms`: CPU time of the best run, if any; `total_ms`: what the probe took."""

    state: KvmState
    reason: str
    hint: str | None
    run_ms: float | None
    total_ms: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the child saw: either a call that `failed` (with `code`, an errno), or how its VM ran.

    `exit_reason` is kvm_run's (api.rst, KVM_RUN); None when the time budget ended the run, or when there was
    none (`run_ms` None, too: an architecture for which we have no guest code).
    """

    failed: str | None = None
    code: int = 0
    exit_reason: int | None = None
    run_ms: float | None = None


def probe(
    device: str = "/dev/kvm",
    *,
    opener: Callable[[str, int], int] = os.open,
    measure: Callable[[int], Measurement | str] | None = None,
) -> KvmProbe:
    """Try `device` in a throw-away VM. Never raises for what KVM does, and waits some seconds for one that hangs.

    The VM lives in a child process, so that a hang or a crash inside KVM is the child's. It is tried again where a
    busy host may be the reason for the answer, or a KVM that never had a VM before. `measure` is given the open
    device and says how a VM ran, or why it did not; None: nixbox's own child.
    """
    start = time.monotonic()
    found = _probe_once(device, opener, measure or _measure, start)
    for _ in range(TRIES - 1):
        if not _may_pass(found) or time.monotonic() - start > PATIENCE_S:
            break
        found = _probe_once(device, opener, measure or _measure, start)
    return found


def _may_pass(found: KvmProbe) -> bool:
    """Whether it was time that ran out, and not a run that no load explains."""
    timed_out = found.run_ms is None and found.hint in (_BUSY_HINT, _SLOW_HINT)
    return found.state is KvmState.UNUSABLE and (
        timed_out or (found.run_ms is not None and found.run_ms < HOPELESS_FROM_MS)
    )


def _probe_once(
    device: str, opener: Callable[[str, int], int], measure: Callable[[int], Measurement | str], start: float
) -> KvmProbe:
    try:
        fd = opener(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        state, reason, hint = _explain_open(device, error)
        run_ms = None
    else:
        try:
            measured = measure(fd)
        finally:
            os.close(fd)
        if isinstance(measured, str):
            state, reason, hint, run_ms = KvmState.UNUSABLE, f"{device}: {measured}", _BUSY_HINT, None
        else:
            (state, reason, hint), run_ms = classify(measured, device), measured.run_ms
            if measured.exit_reason is None:  # it was cut off: that is no time to remember
                run_ms = None
    return KvmProbe(state, reason, hint, run_ms, (time.monotonic() - start) * 1e3)


def classify(seen: Measurement, device: str = "/dev/kvm") -> tuple[KvmState, str, str | None]:
    """State, reason and hint for what the child saw: the rule, without any effect."""
    if seen.failed:
        return KvmState.UNUSABLE, *_explain_failure(seen, device)
    if seen.run_ms is None:
        return KvmState.USABLE, f"{device} makes virtual machines (not timed on this architecture)", None
    if seen.exit_reason not in (_EXIT_HLT, None):
        name = _EXIT_NAMES.get(seen.exit_reason, "reason")
        reason = f"{device} cannot run guest code (KVM_EXIT_{name}, {seen.exit_reason})"
        return KvmState.UNUSABLE, reason, _NESTED_HINT
    if seen.exit_reason is None:
        reason = f"{device} did not get through a short loop within {RUN_LIMIT_S * 1e3:.0f} ms"
        return KvmState.UNUSABLE, reason, _SLOW_HINT
    took = f"{ROUNDS:,} rounds of a loop took {seen.run_ms:.2g} ms"
    if seen.run_ms < USABLE_BELOW_MS:
        return KvmState.USABLE, f"{device} runs guest code natively ({took})", None
    reason = f"{device} is there but emulates guests in software ({took}, not less than {USABLE_BELOW_MS:g})"
    return KvmState.UNUSABLE, reason, _NESTED_HINT


def _explain_failure(seen: Measurement, device: str) -> tuple[str, str | None]:
    if seen.failed == "KVM_GET_API_VERSION":
        return (
            f"{device} is not a KVM device (or speaks another version of the API than {_API_VERSION})",
            None,
        )
    reason = f"{device} failed at {seen.failed}: {os.strerror(seen.code)}"
    if seen.code == errno.EBUSY:
        return reason, "another hypervisor (VirtualBox, for one) may hold the processor: stop its machines"
    return reason, _NESTED_HINT


def _explain_open(device: str, error: OSError) -> tuple[KvmState, str, str | None]:
    """Why a device does not open, and what would help (open(2), section ERRORS)."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        hint = "turn virtualisation on in the firmware and load kvm_intel or kvm_amd (modprobe)"
        return KvmState.ABSENT, f"there is no {device} on this host", hint
    if error.errno in (errno.ENODEV, errno.ENXIO):
        hint = "load the module: sudo modprobe kvm_intel (or kvm_amd)"
        return KvmState.ABSENT, f"no driver is behind {device}", hint
    if error.errno in (errno.EACCES, errno.EPERM):
        return KvmState.NO_PERMISSION, *_explain_permission(device)
    return KvmState.UNUSABLE, f"{device} does not open: {error.strerror}", None


def _explain_permission(device: str) -> tuple[str, str]:
    import grp

    one_user = f"have somebody with root rights run: setfacl -m u:$USER:rw {device}"
    try:
        info = Path(device).stat()
    except OSError:
        return f"{device} may not be opened or looked at by you", one_user
    groups = {os.getegid(), *os.getgroups()}
    group_may = info.st_mode & 0o060 == 0o060
    owner_may = os.geteuid() == info.st_uid and info.st_mode & 0o600 == 0o600
    if os.geteuid() == 0 or owner_may or (group_may and info.st_gid in groups):
        reason = f"{device} is refused although its owner and mode let you open it"
        return reason, "a container or sandbox around you forbids the device: pass it through"
    if not group_may or info.st_gid == 0:  # membership of root's own group is no advice to give
        owner = "root" if info.st_uid == 0 else f"its owner (uid {info.st_uid})"
        return f"only {owner} may open {device} (mode {stat.S_IMODE(info.st_mode):04o})", one_user
    try:
        group = grp.getgrgid(info.st_gid).gr_name
    except KeyError:
        return f"{device} is open to the group {info.st_gid}, which has no name on this host", one_user
    hint = f"sudo usermod -aG {group} $USER, then log out and in again"
    return f"{device} is open to the group {group}, and you are not in it", hint


# --- the cache ----------------------------------------------------------------------------------------------


def cached_probe(cache_dir: Path, device: str = "/dev/kvm") -> KvmProbe:
    """`probe`, remembered in `cache_dir`/kvm.json until boot, kernel, our rights or the device's change.

    Only what is certain is remembered: USABLE, and UNUSABLE after a run so slow that no load explains it. The
    file is checked by hand: importing pydantic takes longer than the probe that the cache saves.
    """
    path = cache_dir / "kvm.json"
    key = _cache_key(device)
    if key is None:
        return probe(device)
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        saved = json.loads(path.read_bytes())
        if saved["key"] == key:
            return _from_json(saved["probe"])
    found = probe(device)
    if _is_certain(found):
        from nixbox import paths  # the child need not pay for it

        text = json.dumps({"key": key, "probe": asdict(found) | {"state": found.state.value}})
        with suppress(OSError, NixboxError):  # a cache that cannot be written costs time, nothing else
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # After a crash the boot id differs anyway.
            paths.write_atomic(path, text, mode=0o600, synced=False)
    return found


def _is_certain(found: KvmProbe) -> bool:
    slow = found.run_ms is not None and found.run_ms >= HOPELESS_FROM_MS
    return found.state is KvmState.USABLE or (found.state is KvmState.UNUSABLE and slow)


def _cache_key(device: str) -> dict[str, Any] | None:
    """What a remembered answer depends on; None when it cannot be told (no such device, no Linux)."""
    try:
        info = os.stat(device)  # noqa: PTH116 - one call for a device given as text
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return {
        "boot_id": boot_id,
        "kernel": os.uname().release,
        "device": [device, info.st_mode, info.st_uid, info.st_gid, info.st_rdev],
        "us": [os.geteuid(), os.getegid(), sorted(os.getgroups())],
        "rule": [ROUNDS, SHORT_ROUNDS, USABLE_BELOW_MS],
    }


def _from_json(saved: dict[str, Any]) -> KvmProbe:
    """Raises KeyError, TypeError or ValueError on anything but what `cached_probe` wrote."""
    match saved:
        case {
            "state": state,
            "reason": str(reason),
            "hint": str() | None as hint,
            "run_ms": float() | None as run_ms,
            "total_ms": float(total_ms),
        }:
            return KvmProbe(KvmState(state), reason, hint, run_ms, total_ms)
    raise ValueError("not a saved probe")


# --- the child ----------------------------------------------------------------------------------------------

# Our own sys.path is handed over: unlike `-m nixbox.machine.kvm` this finds nixbox in a checkout, installed,
# and behind Nix's wrapper scripts, which extend the path of the running interpreter only. -I: no PYTHON*
# variables and no current directory beyond what we use ourselves.
_CHILD = """\
import sys
sys.path[:] = sys.argv[3:]
from nixbox.machine.kvm import child
child(int(sys.argv[1]), int(sys.argv[2]))
"""


def _measure(device_fd: int) -> Measurement | str:
    """Run the child within both limits; a sentence when it did not deliver.

    `spawn` and a pipe, not `run`: that waits without bound for a killed child, and a child stuck inside the
    kernel cannot be killed.
    """
    from nixbox.run import spawn  # 30 ms of import that the child need not pay

    path = [str(Path(entry).absolute()) for entry in sys.path]
    read_fd, write_fd = os.pipe()
    try:
        argv = [sys.executable, "-I", "-c", _CHILD, str(device_fd), str(write_fd), *path]
        try:
            process = spawn(argv, log=Path(os.devnull), pass_fds=(device_fd, write_fd))
        finally:
            os.close(write_fd)
        try:
            line = _read_line(read_fd)
        except BaseException:
            process.kill()
            raise
    finally:
        os.close(read_fd)
    if line is None or line.endswith(b"\n"):
        process.kill()
    code: int | None = None
    with suppress(Exception):  # subprocess.TimeoutExpired: stuck in the kernel; not ours to wait for
        code = process.wait(_REAP_S)
    if line is None:
        return "trying it did not end in time"
    with suppress(ValueError, TypeError):
        return Measurement(**json.loads(line))
    if line or code is None:
        return "trying it gave no sensible answer"
    how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
    return f"trying it ended with {how}"


def _read_line(fd: int) -> bytes | None:
    """What the child says, up to a line end or the end of the file; None when that does not come in time.

    The first byte says that it begins to use KVM.
    """
    data = b""
    end = time.monotonic() + START_LIMIT_S
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not data.endswith(b"\n"):
        if not poll.poll(max(0.0, end - time.monotonic()) * 1e3):
            return None
        if not (chunk := os.read(fd, 4096)):
            break
        if not data:
            end = time.monotonic() + PROBE_LIMIT_S
        data += chunk
    return data


def child(device_fd: int, result_fd: int) -> Never:
    """The child process: measure, write one line of JSON, end."""
    kvm = _Calls()
    os.write(result_fd, b" ")  # what is slow on a slow host is done
    try:
        seen = _try_kvm(kvm, device_fd)
    except KvmCallError as error:
        seen = Measurement(failed=error.call, code=error.code)
    os.write(result_fd, json.dumps(asdict(seen)).encode() + b"\n")
    os._exit(0)  # nothing to tidy up that the kernel does not


class KvmCallError(Exception):
    """One KVM call failed; stays inside the child."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call}: {os.strerror(code)}")
        self.call = call
        self.code = code


# From linux/kvm.h and asm/kvm.h (x86-64). Of kvm_run only the beginning: the kernel tells the mapping's size.
STRUCTS = """
struct kvm_userspace_memory_region {
    uint32_t slot, flags; uint64_t guest_phys_addr, memory_size, userspace_addr;
};
struct kvm_regs {
    uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags;
};
struct kvm_segment {
    uint64_t base; uint32_t limit; uint16_t selector;
    uint8_t type, present, dpl, db, s, l, g, avl, unusable, padding;
};
struct kvm_dtable { uint64_t base; uint16_t limit, padding[3]; };
struct kvm_sregs {
    struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
    struct kvm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap[4];
};
struct kvm_run {
    uint8_t request_interrupt_window, immediate_exit, padding1[6];
    uint32_t exit_reason;
};
int ioctl(int fd, unsigned long request, ...);
"""

# Request numbers: _IOC(direction, 0xAE, number, size) of asm-generic/ioctl.h; where a struct crosses, its
# size is part of the number, so that a wrong declaration above is refused by the kernel (ENOTTY).
_NUMBERS: dict[str, tuple[int, int, str | None]] = {
    "KVM_GET_API_VERSION": (0, 0x00, None),
    "KVM_CREATE_VM": (0, 0x01, None),
    "KVM_CHECK_EXTENSION": (0, 0x03, None),
    "KVM_GET_VCPU_MMAP_SIZE": (0, 0x04, None),
    "KVM_CREATE_VCPU": (0, 0x41, None),
    "KVM_SET_USER_MEMORY_REGION": (1, 0x46, "struct kvm_userspace_memory_region"),
    "KVM_SET_TSS_ADDR": (0, 0x47, None),
    "KVM_RUN": (0, 0x80, None),
    "KVM_SET_REGS": (1, 0x82, "struct kvm_regs"),
    "KVM_GET_SREGS": (2, 0x83, "struct kvm_sregs"),
    "KVM_SET_SREGS": (1, 0x84, "struct kvm_sregs"),
}
_API_VERSION = 12
_CAP_ARM_VM_IPA_SIZE = 165
_TSS_ADDRESS = 0xFFFBD000  # three pages that Intel's real mode needs, below 4 GiB and outside our memory
_MEMORY_BYTES = 0x8000
_CODE_BYTES = 10
_CODE, _PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000, 0x4000


class _Calls:
    """KVM's ioctls by name; `ioctl` is declared variadic: some ABIs pass such arguments in other places."""

    def __init__(self) -> None:
        from cffi import FFI

        self.ffi = FFI()
        self.ffi.cdef(STRUCTS)
        self._libc = self.ffi.dlopen(None)

    def __call__(self, fd: int, name: str, argument: Any = 0) -> int:
        direction, number, struct = _NUMBERS[name]
        size = self.ffi.sizeof(struct) if struct else 0
        request = direction << 30 | size << 16 | 0xAE << 8 | number
        value = self.ffi.cast("unsigned long", argument) if isinstance(argument, int) else argument
        result: int = self._libc.ioctl(fd, request, value)
        if result < 0:
            raise KvmCallError(name, self.ffi.errno)
        return result


def _try_kvm(kvm: _Calls, device_fd: int) -> Measurement:
    """Make a VM with one virtual processor and, on x86-64, time its loop."""
    if kvm(device_fd, "KVM_GET_API_VERSION") != _API_VERSION:
        raise KvmCallError("KVM_GET_API_VERSION", errno.EINVAL)
    machine = os.uname().machine
    # Arm: 0 means 40 bits of guest address, which small processors lack; ask for what there is (api.rst 4.2).
    kind = kvm(device_fd, "KVM_CHECK_EXTENSION", _CAP_ARM_VM_IPA_SIZE) if machine == "aarch64" else 0
    vm = kvm(device_fd, "KVM_CREATE_VM", kind)
    if machine != "x86_64":
        kvm(vm, "KVM_CREATE_VCPU", 0)
        return Measurement()
    return _time_loop(kvm, device_fd, vm)


def _time_loop(kvm: _Calls, device_fd: int, vm: int) -> Measurement:
    import mmap

    ffi = kvm.ffi
    kvm(vm, "KVM_SET_TSS_ADDR", _TSS_ADDRESS)
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
    region = {"memory_size": _MEMORY_BYTES, "userspace_addr": address}
    kvm(vm, "KVM_SET_USER_MEMORY_REGION", ffi.new("struct kvm_userspace_memory_region *", region))
    vcpu = kvm(vm, "KVM_CREATE_VCPU", 0)
    shared = mmap.mmap(vcpu, kvm(device_fd, "KVM_GET_VCPU_MMAP_SIZE"))
    state = ffi.cast("struct kvm_run *", ffi.from_buffer(shared))
    _enter_long_mode(kvm, vcpu, memory)

    def out_of_time(*_: object) -> None:
        state.immediate_exit = 1  # for a KVM_RUN about to start; one under way is ended by the signal itself

    def run(rounds: int) -> tuple[int | None, float]:
        memory[_CODE : _CODE + _CODE_BYTES] = _loop_code(rounds)
        kvm(vcpu, "KVM_SET_REGS", ffi.new("struct kvm_regs *", {"rip": _CODE, "rflags": 2}))
        # CPU time of this thread (which includes the guest's), not wall time: other load on the host then
        # does not make a good KVM look slow.
        start = time.thread_time_ns()
        exit_reason: int | None = None
        try:
            kvm(vcpu, "KVM_RUN")
            exit_reason = state.exit_reason
        except KvmCallError as error:
            if error.code != errno.EINTR:
                raise
        return exit_reason, (time.thread_time_ns() - start) / 1e6

    clocks = ((signal.ITIMER_PROF, signal.SIGPROF, RUN_BUDGET_S), (signal.ITIMER_REAL, signal.SIGALRM, RUN_LIMIT_S))
    for _, number, _ in clocks:
        signal.signal(number, out_of_time)

    def limited(rounds: int) -> tuple[int | None, float]:
        state.immediate_exit = 0
        # Again and again: a signal just before the call would otherwise be handled after it, that is, never.
        for clock, _, seconds in clocks:
            signal.setitimer(clock, seconds, 0.005)
        try:
            return run(rounds)
        finally:
            for clock, _, _ in clocks:
                signal.setitimer(clock, 0)

    return best_run(limited)


def best_run(run: Callable[[int], tuple[int | None, float]]) -> Measurement:
    """Warm up, then the best of some runs, in ms for ROUNDS; fewer when they tell enough or time is up.

    `run` takes a number of rounds and gives kvm_run's exit reason (None: out of time) and its time in ms.
    """
    exit_reason, took_ms = run(WARM_UP_ROUNDS)
    if exit_reason != _EXIT_HLT:
        return Measurement(exit_reason=exit_reason, run_ms=took_ms)
    best_ms: float | None = None
    for number in range(RUNS):
        exit_reason, took_ms = run(SHORT_ROUNDS)
        took_ms *= ROUNDS / SHORT_ROUNDS
        if exit_reason is None and best_ms is not None:
            exit_reason = _EXIT_HLT  # out of time: the runs before tell more
            break
        best_ms = took_ms if best_ms is None else min(best_ms, took_ms)
        hopeless = number + 1 >= HOPELESS_RUNS and best_ms >= HOPELESS_FROM_MS
        if exit_reason != _EXIT_HLT or best_ms < USABLE_BELOW_MS or hopeless:
            break
    return Measurement(exit_reason=exit_reason, run_ms=best_ms)


def _loop_code(rounds: int) -> bytes:
    """`mov ecx, rounds; 1: dec ecx; jnz 1b; hlt`."""
    return b"\xb9" + rounds.to_bytes(4, "little") + b"\xff\xc9" + b"\x75\xfc" + b"\xf4"


def _enter_long_mode(kvm: _Calls, vcpu: int, memory: Any) -> None:
    """64-bit code, the first 2 MiB mapped to themselves (Intel SDM vol. 3, 4.5 and 10.8.5)."""
    present_writable, large_page = 0x3, 0x80
    tables = ((_PML4, _PDPT | present_writable), (_PDPT, _PD | present_writable), (_PD, 0x3 | large_page))
    for table, entry in tables:
        memory[table : table + 8] = entry.to_bytes(8, "little")
    sregs = kvm.ffi.new("struct kvm_sregs *")
    kvm(vcpu, "KVM_GET_SREGS", sregs)
    flat = {"limit": 0xFFFFFFFF, "present": 1, "s": 1, "g": 1}
    sregs.cs = flat | {"selector": 8, "type": 11, "l": 1}
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, flat | {"selector": 16, "type": 3, "db": 1})
    sregs.cr3 = _PML4
    sregs.cr4 = 0x20  # PAE
    sregs.efer = 0x500  # LME, LMA
    sregs.cr0 = 0x80000011  # PG, ET, PE
    kvm(vcpu, "KVM_SET_SREGS", sregs)
