"""The KVM probe without a KVM: the rule, the words, the bounds of the child and the cache."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixbox.machine import kvm
from nixbox.machine.kvm import KvmProbe, KvmState, Measurement

HLT = 5
HANG_S = 10.0  # a bound against hangs, not a measure of speed


# --- the rule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "state", "words"),
    [
        (Measurement(exit_reason=HLT, run_ms=0.02), KvmState.USABLE, "natively"),
        (Measurement(exit_reason=HLT, run_ms=0.9), KvmState.USABLE, "natively"),
        (Measurement(exit_reason=HLT, run_ms=kvm.USABLE_BELOW_MS), KvmState.UNUSABLE, "emulates"),
        (Measurement(exit_reason=HLT, run_ms=28.6), KvmState.UNUSABLE, "took 29 ms"),
        (Measurement(exit_reason=None, run_ms=40.0), KvmState.UNUSABLE, "did not get through"),
        (Measurement(exit_reason=None, run_ms=0.1), KvmState.UNUSABLE, "did not get through"),
        (Measurement(exit_reason=17, run_ms=0.1), KvmState.UNUSABLE, "KVM_EXIT_INTERNAL_ERROR"),
        (Measurement(exit_reason=99, run_ms=0.1), KvmState.UNUSABLE, "99"),
        (Measurement(), KvmState.USABLE, "not timed on this architecture"),
        (Measurement(failed="KVM_GET_API_VERSION", code=errno.ENOTTY), KvmState.UNUSABLE, "not a KVM device"),
        (Measurement(failed="KVM_CREATE_VM", code=errno.EBUSY), KvmState.UNUSABLE, "KVM_CREATE_VM"),
        (Measurement(failed="KVM_RUN", code=errno.EFAULT), KvmState.UNUSABLE, "Bad address"),
    ],
)
def test_the_rule(seen: Measurement, state: KvmState, words: str) -> None:
    found, reason, hint = kvm.classify(seen, "/dev/kvm")
    assert found is state
    assert words in reason
    assert "/dev/kvm" in reason
    assert state is KvmState.UNUSABLE or hint is None


def play(*runs: tuple[int | None, float]) -> tuple[Measurement, list[int]]:
    """`best_run` on scripted runs, and the rounds that it asked for."""
    asked: list[int] = []
    script = iter(runs)

    def run(rounds: int) -> tuple[int | None, float]:
        asked.append(rounds)
        return next(script)

    return kvm.best_run(run), asked


def test_a_fast_run_is_enough() -> None:
    assert play((HLT, 9.0), (HLT, 0.1)) == (Measurement(exit_reason=HLT, run_ms=0.4), [1_000, 5_000])


def test_what_is_far_too_slow_is_believed_when_five_runs_say_so() -> None:
    seen, asked = play((HLT, 1.4), (HLT, 7.5), (HLT, 7.0), *[(HLT, 7.5)] * 3)
    assert (seen, asked) == (Measurement(exit_reason=HLT, run_ms=28.0), [1_000] + [5_000] * 5)
    assert play((HLT, 1.4), (HLT, 7.0), (None, 2.0))[0] == Measurement(exit_reason=HLT, run_ms=28.0)


def test_a_stall_of_the_host_is_no_slow_kvm() -> None:
    seen, asked = play((HLT, 0.1), (HLT, 28.0), (HLT, 0.2))
    assert (seen, asked) == (Measurement(exit_reason=HLT, run_ms=0.8), [1_000, 5_000, 5_000])
    seen, _ = play((HLT, 0.1), (HLT, 28.0), (HLT, 14.0), (HLT, 0.2))
    assert seen.run_ms == 0.8


def test_in_doubt_the_best_of_six_counts() -> None:
    seen, asked = play((HLT, 0.2), (HLT, 2.0), (HLT, 1.5), *[(HLT, 6.0)] * 4)
    assert seen == Measurement(exit_reason=HLT, run_ms=6.0)
    assert asked == [1_000] + [5_000] * 6
    assert play((HLT, 0.2), *[(HLT, 2.0)] * 5, (HLT, 0.5))[0].run_ms == 2.0


def test_a_run_that_time_cut_off_does_not_replace_a_finished_one() -> None:
    assert play((HLT, 0.2), (HLT, 2.0), (None, 2.0))[0] == Measurement(exit_reason=HLT, run_ms=8.0)
    assert play((HLT, 0.2), (None, 39.0))[0].exit_reason is None


def test_a_guest_that_faults_is_not_run_again() -> None:
    assert play((8, 0.2)) == (Measurement(exit_reason=8, run_ms=0.2), [1_000])
    assert play((HLT, 0.2), (8, 5.0)) == (Measurement(exit_reason=8, run_ms=20.0), [1_000, 5_000])


def test_structures_have_the_sizes_and_offsets_of_linux_kvm_h() -> None:
    ffi = kvm._Calls().ffi
    sizes = {"userspace_memory_region": 32, "regs": 144, "segment": 24, "dtable": 16, "sregs": 312}
    assert {name: ffi.sizeof(f"struct kvm_{name}") for name in sizes} == sizes
    assert ffi.offsetof("struct kvm_run", "immediate_exit") == 1
    assert ffi.offsetof("struct kvm_run", "exit_reason") == 8
    assert ffi.offsetof("struct kvm_sregs", "cr0") == 224
    assert len(kvm._loop_code(1)) == kvm._CODE_BYTES


# --- opening ------------------------------------------------------------------------------------------------


def refusing(code: int) -> Callable[[str, int], int]:
    def opener(path: str, flags: int) -> int:
        raise OSError(code, os.strerror(code), path)

    return opener


def test_a_missing_device_is_absent(tmp_path: Path) -> None:
    found = kvm.probe(str(tmp_path / "kvm"))
    assert (found.state, found.run_ms) == (KvmState.ABSENT, None)
    assert found.hint is not None


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (errno.ENODEV, KvmState.ABSENT),
        (errno.EACCES, KvmState.NO_PERMISSION),
        (errno.EPERM, KvmState.NO_PERMISSION),
        (errno.EMFILE, KvmState.UNUSABLE),
    ],
)
def test_what_open_says_becomes_a_state(code: int, state: KvmState, tmp_path: Path) -> None:
    assert kvm.probe(str(tmp_path), opener=refusing(code)).state is state


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="nb-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def probe_as_nobody(device: Path) -> dict[str, str]:
    """`probe` in a forked child without root's rights (root opens any file, whatever its mode)."""
    read_end, write_end = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            found = kvm.probe(str(device))
            words = {"state": found.state.name, "reason": found.reason, "hint": found.hint}
            os.write(write_end, json.dumps(words).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        text = file.read()
    os.waitpid(pid, 0)
    result: dict[str, str] = json.loads(text)
    return result


def test_a_device_for_root_alone(open_dir: Path) -> None:
    device = open_dir / "kvm"
    device.touch(mode=0o000)
    found = probe_as_nobody(device)
    owner = "root" if os.geteuid() == 0 else f"its owner (uid {os.geteuid()})"
    assert found["state"] == "NO_PERMISSION"
    assert found["reason"] == f"only {owner} may open {device} (mode 0000)"
    assert "setfacl" in found["hint"]


def test_a_device_for_a_group_that_we_are_not_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    device.touch()
    if os.geteuid() == 0:
        os.chown(device, 0, 1)  # membership of root's own group is never advised
    device.chmod(0o660)
    group = device.group()
    monkeypatch.setattr(os, "geteuid", lambda: 65533)
    monkeypatch.setattr(os, "getegid", lambda: 65533)
    monkeypatch.setattr(os, "getgroups", lambda: [65533])
    found = kvm.probe(str(device), opener=refusing(errno.EACCES))
    assert found.state is KvmState.NO_PERMISSION
    assert found.reason == f"{device} is open to the group {group}, and you are not in it"
    assert found.hint == f"sudo usermod -aG {group} $USER, then log out and in again"


def test_refused_in_spite_of_the_mode_is_a_sandbox(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0o600)
    found = kvm.probe(str(device), opener=refusing(errno.EPERM))
    assert "although" in found.reason
    assert found.hint is not None
    assert "sandbox" in found.hint


# --- the child's bounds -------------------------------------------------------------------------------------


def test_a_file_that_is_no_kvm_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    found = kvm.probe(str(tmp_path / "kvm"))
    assert found.state is KvmState.UNUSABLE
    assert "is not a KVM device" in found.reason


@pytest.mark.parametrize(
    ("first", "second", "state", "tried"),
    [
        ("time.sleep(600)", "say(0.5)", KvmState.USABLE, 2),  # it hung once
        ("say(50, exit_reason=None)", "say(0.5)", KvmState.USABLE, 2),  # out of CPU time
        ("say(kvm.USABLE_BELOW_MS)", "say(kvm.USABLE_BELOW_MS)", KvmState.UNUSABLE, kvm.TRIES),
        ("say(kvm.HOPELESS_FROM_MS)", "say(0.5)", KvmState.UNUSABLE, 1),  # no load explains that
        ("say(0.5)", "say(50)", KvmState.USABLE, 1),
    ],
)
def test_what_may_pass_is_tried_again(
    first: str, second: str, state: KvmState, tried: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"
    child = f"""
import json, os, sys, time
sys.path[:] = sys.argv[3:]
from nixbox.machine import kvm
def say(run_ms, exit_reason=5):
    found = {{"failed": None, "code": 0, "exit_reason": exit_reason, "run_ms": float(run_ms)}}
    os.write(int(sys.argv[2]), json.dumps(found).encode() + b"\\n")
with open({str(tries)!r}, "a") as file:
    file.write("x")
os.write(int(sys.argv[2]), b" ")
if os.path.getsize({str(tries)!r}) == 1:
    {first}
else:
    {second}
"""
    monkeypatch.setattr(kvm, "_CHILD", child)
    assert kvm.probe(os.devnull).state is state
    assert len(tries.read_text()) == tried


@pytest.mark.parametrize(
    ("child", "words"),
    [
        ("import time; time.sleep(600)", "did not end in time"),
        ("import os, sys, time; os.write(int(sys.argv[2]), b'{'); time.sleep(600)", "did not end in time"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os, sys; os.write(int(sys.argv[2]), b'nonsense\\n')", "no sensible answer"),
        ("import os, sys; os.write(int(sys.argv[2]), b'{\"other\": 1}\\n')", "no sensible answer"),
    ],
)
def test_a_child_that_hangs_dies_or_raves(child: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "_CHILD", child)
    monkeypatch.setattr(kvm, "START_LIMIT_S", 0.9)
    start = time.monotonic()
    found = kvm.probe(os.devnull)
    assert time.monotonic() - start < HANG_S
    assert found.state is KvmState.UNUSABLE
    assert words in found.reason


# --- the cache ----------------------------------------------------------------------------------------------


class Prober:
    """Stands in for `probe`: gives what it is told and counts."""

    def __init__(self, state: KvmState, run_ms: float | None) -> None:
        self.found = KvmProbe(state, "said so", None, run_ms, 30.5)
        self.calls = 0

    def __call__(self, device: str) -> KvmProbe:
        self.calls += 1
        return self.found


@pytest.fixture
def prober(monkeypatch: pytest.MonkeyPatch) -> Prober:
    prober = Prober(KvmState.USABLE, 0.02)
    monkeypatch.setattr(kvm, "probe", prober)
    return prober


def test_the_second_question_is_answered_from_the_cache(prober: Prober, tmp_path: Path) -> None:
    first = kvm.cached_probe(tmp_path / "new", os.devnull)
    assert kvm.cached_probe(tmp_path / "new", os.devnull) == first == prober.found
    assert prober.calls == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kvm.json"]


@pytest.mark.parametrize("part", ["boot_id", "kernel", "device", "us", "rule"])
def test_another_boot_kernel_device_or_user_asks_again(part: str, prober: Prober, tmp_path: Path) -> None:
    kvm.cached_probe(tmp_path, os.devnull)
    path = tmp_path / "kvm.json"
    saved = json.loads(path.read_text())
    saved["key"][part] = "another"
    path.write_text(json.dumps(saved))
    kvm.cached_probe(tmp_path, os.devnull)
    kvm.cached_probe(tmp_path, os.devnull)
    assert prober.calls == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"key": 1}', "\udcff", "[" * 100_000, "KEY", "STATE"], ids=range(9)
)
def test_a_corrupt_cache_is_ignored_and_written_anew(text: str, prober: Prober, tmp_path: Path) -> None:
    kvm.cached_probe(tmp_path, os.devnull)
    path = tmp_path / "kvm.json"
    saved = json.loads(path.read_text())
    if text == "KEY":
        text = json.dumps({"key": saved["key"], "probe": {"state": "usable"}})
    elif text == "STATE":
        text = json.dumps({"key": saved["key"], "probe": saved["probe"] | {"state": ["splendid"]}})
    path.write_text(text, errors="surrogateescape")
    assert kvm.cached_probe(tmp_path, os.devnull) == prober.found
    assert kvm.cached_probe(tmp_path, os.devnull) == prober.found
    assert prober.calls == 2


@pytest.mark.parametrize(
    ("state", "run_ms", "kept"),
    [
        (KvmState.USABLE, 0.02, True),
        (KvmState.USABLE, None, True),
        (KvmState.UNUSABLE, 28.0, True),
        (KvmState.UNUSABLE, 4.0, False),  # too near to the limit to stick
        (KvmState.UNUSABLE, None, False),  # a busy host, a hypervisor that will go away
        (KvmState.NO_PERMISSION, None, False),
    ],
)
def test_only_what_is_certain_is_kept(
    state: KvmState, run_ms: float | None, kept: bool, prober: Prober, tmp_path: Path
) -> None:
    prober.found = KvmProbe(state, "said so", "do this", run_ms, 30.5)
    assert kvm.cached_probe(tmp_path, os.devnull) == kvm.cached_probe(tmp_path, os.devnull)
    assert prober.calls == (1 if kept else 2)


def test_a_cache_that_cannot_be_written_is_no_failure(prober: Prober, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert kvm.cached_probe(tmp_path / "file" / "cache", os.devnull) == prober.found


def test_a_missing_device_needs_no_cache(tmp_path: Path) -> None:
    assert kvm.cached_probe(tmp_path, str(tmp_path / "kvm")).state is KvmState.ABSENT
    assert list(tmp_path.iterdir()) == []
