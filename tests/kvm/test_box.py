"""The box itself: what goes in and comes out, and that one does not see another."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench.kvm import resident
from tests.kvm import box as boxes
from tests.kvm.box import Box, BoxError, Saved


def test_commands_and_files_go_both_ways(box: Box) -> None:
    (box.work / "file").write_text("in\n")
    done = box.run(
        ["sh", "-c", 'cat /box/file; echo "$WORD" >/box/other; echo err >&2; exit 3'], env={"WORD": "a 'b'"}
    )
    assert (done.code, done.stdout, done.stderr) == (3, "in\n", "err\n")
    assert (box.work / "other").read_text() == "a 'b'\n"
    assert box.run(["pwd"], cwd="/usr").stdout == "/usr\n"
    assert box.run(["sleep", "0.3"]).seconds >= 0.29


def test_who_is_waited_for_is_interrupted(box: Box) -> None:
    """So that it gets over a timer's interrupt that it has missed."""
    script = "keys() { grep 'i8042$' /proc/interrupts | head -n 1; }; keys; sleep 5; keys"
    before, after = (int(line.split()[1]) for line in box.run(["sh", "-c", script]).stdout.splitlines())
    assert after >= before + 2


def test_it_is_a_kvm_host_with_this_hosts_files(box: Box) -> None:
    assert (
        box.run(["sh", "-c", "test -c /dev/kvm && unshare -Urn true && cat /proc/cpuinfo"]).stdout.count("svm") >= 1
    )
    for command in ("touch /usr/made; test -e /usr/made", "test -e /proc/self/exe"):
        assert box.run(["sh", "-c", command]).code == 0, command


def test_what_is_opened_once_is_in_memory(box: Box) -> None:
    program = Path("/usr/bin/qemu-system-x86_64")

    def grows(apart_from: str) -> int:
        used = ["df", "--block-size=1", "--output=used", "/"]  # of the tmpfs over the host's files
        before = int(box.run(used).stdout.split()[1])
        with resident(box, Path(apart_from)):
            assert box.run(["head", "-c", "1", str(program)]).code == 0
        return int(box.run(used).stdout.split()[1]) - before

    assert grows("/usr/bin") < program.stat().st_size <= grows("/usr/share")


def test_another_begins_where_the_first_did(saved: Saved) -> None:
    for _ in range(2):
        begun = time.monotonic()
        with boxes.restored(saved) as box:
            print(f"restored and mounted in {time.monotonic() - begun:.2f} s")
            assert box.run(["sh", "-c", "mkdir /made"]).code == 0, "it is not there yet"


def test_what_takes_too_long_or_ends_it_is_an_error(saved: Saved) -> None:
    with boxes.restored(saved) as box, pytest.raises(BoxError, match="did not answer within 1 s"):
        box.run(["sleep", "60"], timeout_s=1)
    with boxes.restored(saved) as box, pytest.raises(BoxError, match="has ended"):
        box.run(["sh", "-c", "echo 1 >/proc/sys/kernel/sysrq; echo b >/proc/sysrq-trigger; sleep 60"])
