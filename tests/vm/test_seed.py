"""Copies between host and guest with real machines: every kind of file, interruptions, full disks, hostile guests."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_tar import END, HOSTILE, OLD_NS, member, tree, zoo
from tests.vm.conftest import Home, Workspace, _end

HANG_S = 120.0  # a bound against hanging, never an expectation
RESOURCES = '[resources]\nvcpus = 2\nmemory = "384MiB"\ndisk = "1GiB"\n'
MACHINE = f'name = "box"\npackages = ["zstd"]\nmounts = []\n{RESOURCES}'
KILLS = 30

# What a caller of the library does: `before` is Python text that may change the engine. The result is a line of JSON.
DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from nixbox.errors import NixboxError
from nixbox.guest import listing, seed, stream
from nixbox.machine.record import MachineDir
from nixbox.report import LineReporter
from nixbox.session import stop
workspace, source, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
force, before = options.pop("force", False), options.pop("before", "")
exec(before)
endpoint = stop.reached(MachineDir(workspace, "box"))
wanted = seed.Wanted(source, options["target"], tuple(options.get("exclude", ())), options.get("sentinel"))
try:
    done = None if options.get("ask") else seed.seed(endpoint, wanted, force=force, report=LineReporter())
    lacks = seed.pending(endpoint, [wanted])
except NixboxError as error:
    sys.exit(f"{error.message}\\nhint: {error.hint}")
print(json.dumps({"lacks": lacks[0], "done": done and dataclasses.asdict(done)}))
"""
# The same of a directory on either side: kinds, modes, times, links, then contents. Ten GiB of hole are not read.
DIGEST = r"""
cd "$1"
export LC_ALL=C
{
  find . -type d -printf '%y %m %T@ %p\0' -o -printf '%y %m %T@ %s %n %l %p\0' | sort -z
  find . -type f -size -1G -print0 | sort -z | xargs -0r sha256sum -z
} | sha256sum
"""


@pytest.fixture(scope="module")
def box(home: Home) -> Iterator[Workspace]:
    """One machine with two processors, and zstd in its image."""
    path = Path(tempfile.mkdtemp(prefix="w", dir=home.path))
    found = Workspace(path, home.env)
    found.config(MACHINE)
    (path / ".nixbox" / "nixbox.lock").write_text(home.lock)
    found("up")
    yield found
    _end(found)


@pytest.fixture(autouse=True)
def _clean(box: Workspace) -> Iterator[None]:
    """Nothing of one test is there for the next; and no test leaves a process or a half of a seed in the guest."""
    # On the disk, too: a machine that is killed would have it back.
    box.guest("sudo rm -rf ~/t ~/.local /srv/t; sync")
    yield
    eventually(lambda: box.guest("ps -eo comm= | grep -cxE 'tar|zstd|flock' || :").strip() == "0", "tar to end")
    assert box.guest("sudo find / -xdev -name '.nixbox-seed-*'") == ""


def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.2)


def begin(box: Workspace, source: Path, target: str = "~/t/cache", **options: Any) -> subprocess.Popen[str]:
    """A process that seeds."""
    argv = [sys.executable, "-c", DRIVER, str(box.path), str(source), json.dumps({"target": target, **options})]
    return subprocess.Popen(argv, env=dict(box.env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def seed(box: Workspace, source: Path, target: str = "~/t/cache", **options: Any) -> dict[str, Any]:
    """Seed, successfully; what `seed` said, and `lacks` of `pending`."""
    process = begin(box, source, target, **options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def refused(box: Workspace, source: Path, target: str = "~/t/cache", **options: Any) -> str:
    """Seed in vain: nothing counts as done; what was said."""
    process = begin(box, source, target, **options)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    options = {key: value for key, value in options.items() if key != "before"}
    assert seed(box, source, target, ask=True, **options)["lacks"]
    return err


def in_guest(box: Workspace, path: str) -> str:
    words = path if path.startswith("~") else shlex.quote(path)
    return box.guest(f"set -- {words}\n{DIGEST}")


def on_host(path: Path) -> str:
    return subprocess.run(["sh", "-euc", DIGEST, "sh", str(path)], capture_output=True, text=True, check=True).stdout


def files(root: Path, count: int, size: int = 2000) -> Path:
    """A tree like a package cache's: small files that cannot be compressed, a hundred in a directory."""
    rng = random.Random(7)
    for i in range(count):
        directory = root / f"org{i // 1000}" / f"module-{i // 100}"
        if i % 100 == 0:
            directory.mkdir(parents=True)
        (directory / f"{i}.jar").write_bytes(rng.randbytes(rng.randrange(2 * size)))
    return root


def test_every_kind_of_file_goes_both_ways(box: Workspace, tmp_path: Path) -> None:
    source, back = tmp_path / "zoo", tmp_path / "back"
    zoo(source)
    os.mkfifo(source / "pipe")
    os.utime(source, ns=(OLD_NS, OLD_NS))
    first = seed(box, source, exclude=["excluded"])
    assert not first["lacks"]
    assert (first["done"]["how"], first["done"]["skipped"]) == ("seeded", {"fifo": 1})
    (source / "pipe").unlink()
    os.utime(source, ns=(OLD_NS, OLD_NS))
    assert in_guest(box, "~/t/cache") == on_host(source)
    assert box.guest('find ~/t/cache ! -user "$(id -un)"; find ~/t/cache ! -group "$(id -gn)"') == ""
    size, blocks = map(int, box.guest("stat -c '%s %b' ~/t/cache/holes").split())
    assert (size, blocks < 1000) == (10 << 30, True)
    assert box.guest("tail -c +1048577 ~/t/cache/holes | head -c 6000").encode() == b"middle" * 1000
    assert seed(box, source, exclude=["excluded"])["done"]["how"] == "done before"
    assert seed(box, source, ask=True)["lacks"], "without the exclude it is another seed"

    # What a guest's link or bit could do on the host does not come.
    said = box("cp", "guest:t/cache", str(back)).stderr
    assert "1 × symbolic link that leads out left out" in said
    (source / "to root").unlink()
    (source / "tool").chmod(0o755)
    os.utime(source, ns=(OLD_NS, OLD_NS))
    assert tree(back) == tree(source)
    box("cp", str(back), "guest:t/again")
    assert in_guest(box, "~/t/again") == on_host(back)


def test_many_small_files_in_several_streams(box: Workspace, tmp_path: Path) -> None:
    source = files(tmp_path / "s", 20_000, 1000)
    done = seed(box, source, "~/t/many")["done"]
    assert (done["files"], done["streams"]) == (20_000, 2)
    assert in_guest(box, "~/t/many") == on_host(source)


@pytest.mark.parametrize("how", ["zstd", "plain", "no zstd"])
def test_zstd_or_not_as_measured(box: Workspace, tmp_path: Path, how: str) -> None:
    (tmp_path / "s").mkdir()
    line = b"a line of a log that says the same again and again, with a number: %d\n"
    (tmp_path / "s" / "log").write_bytes(b"".join(line % i for i in range(600_000)))
    # Which is quicker is measured; here the bar is moved, so that the outcome is known.
    bar = {"zstd": "stream._WORTH_IT = 1000", "plain": "stream._WORTH_IT = 0.1; stream._SHRINKS = 1", "no zstd": ""}
    if how == "no zstd":
        box.guest("sudo mv /usr/bin/zstd /usr/bin/zstd.away")
    try:
        done = seed(box, tmp_path / "s", before=bar[how])["done"]
    finally:
        if how == "no zstd":
            box.guest("sudo mv /usr/bin/zstd.away /usr/bin/zstd")
    assert done["zstd"] is (how == "zstd")
    assert ("the guest has no zstd" if how == "no zstd" else "MB/s with zstd") in done["why"]
    assert in_guest(box, "~/t/cache") == on_host(tmp_path / "s")


def test_incompressible_data_is_sent_as_it_is(box: Workspace, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "noise").write_bytes(os.urandom(40 << 20))
    done = seed(box, tmp_path / "s")["done"]
    assert (done["zstd"], done["streams"]) == (False, 1)
    assert "shrinks to 100% only" in done["why"]


def test_killed_at_random_points_and_run_again(box: Workspace, tmp_path: Path) -> None:
    source = files(tmp_path / "s", 500)
    (source / "readonly").mkdir()
    (source / "readonly" / "file").write_bytes(b"x")
    (source / "readonly").chmod(0o555)
    begun = time.monotonic()
    seed(box, source)
    whole_s = time.monotonic() - begun
    box.guest("sudo rm -rf ~/t ~/.local")
    rng = random.Random(5)
    interrupted = 0
    for i in range(KILLS):
        if i == KILLS // 2:  # from here on there are files of the guest's own
            box.guest("mkdir -p ~/t/cache/org0/mine; echo own | tee ~/t/cache/own ~/t/cache/org0/mine/own")
        # What a former one may have brought must not stay when the source has it no more.
        extra = source / "org0" / f"only in {i}"
        extra.write_bytes(b"x")
        process = begin(box, source)
        time.sleep(whole_s * (i % 10 + rng.random()) / 10)
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]))
        process.communicate(timeout=HANG_S)
        interrupted += process.returncode != 0
        if not seed(box, source, ask=True)["lacks"]:  # the kill came too late: nothing was left for the host to do
            assert _without_own(box, source) == on_host(source)
        extra.unlink()
        if i % 5 == 4:
            seed(box, source, force=True)
            assert _without_own(box, source) == on_host(source)
            own = box.guest("cd ~/t/cache; cat own org0/mine/own 2>/dev/null || :").split()
            assert own == (["own", "own"] if i >= KILLS // 2 else [])
        # Where the host was killed late, the guest may still finish this seed; the next shall be one of its own.
        box.guest("cd ~/.local/state/nixbox/seeds 2>/dev/null || exit 0; flock *.lock true; rm -f ????????????????")
    assert interrupted >= KILLS // 2, "the kills came too late to say anything"


def _without_own(box: Workspace, source: Path) -> str:
    """The digest of the cache without the guest's own files, which changed the times of two directories."""
    for name in (".", "org0"):
        os.utime(source / name, ns=(OLD_NS, OLD_NS))
    when = f"{OLD_NS // 10**9}.{OLD_NS % 10**9:09d}"
    box.guest("sudo rm -rf ~/t/copy; cp -a ~/t/cache ~/t/copy; cd ~/t/copy; rm -rf own org0/mine")
    box.guest(f"cd ~/t/copy; touch -d @{when} org0 .")
    return in_guest(box, "~/t/copy")


def test_the_machine_is_killed_meanwhile(box: Workspace, tmp_path: Path) -> None:
    source = files(tmp_path / "s", 3000)
    process = begin(box, source)
    eventually(lambda: box.guest("ls -A ~/t/.nixbox-seed-*/new 2>/dev/null || :") != "", "files to come")
    os.kill(box.vm_pids()[0], signal.SIGKILL)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    box("up")
    assert seed(box, source, ask=True)["lacks"]
    seed(box, source)
    assert in_guest(box, "~/t/cache") == on_host(source)


def test_two_seeds_of_one_target_at_once(box: Workspace, tmp_path: Path) -> None:
    source = files(tmp_path / "s", 1500)
    both = [begin(box, source), begin(box, source)]
    done = [process.communicate(timeout=HANG_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], done
    assert sorted(json.loads(out)["done"]["how"] for out, _ in done) == ["done before", "seeded"]
    assert any("waiting for another seed" in err for _, err in done)
    assert in_guest(box, "~/t/cache") == on_host(source)


def test_places_sentinels_and_single_files(box: Workspace, tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    (source / "file").write_bytes(b"1")
    # A place that only root can make, with a sentinel of its own.
    assert not seed(box, source, "/srv/t/x y/cache", sentinel="/srv/t/x y/.done")["lacks"]
    assert box.guest("stat -c %U '/srv/t/x y/cache' '/srv/t/x y/cache/file'").split() == ["nixbox", "nixbox"]
    assert box.guest("head -n 2 '/srv/t/x y/.done'").splitlines()[1] == "files 1"
    # Where it is gone, or was never ours, the seed is not done.
    box.guest("sudo rm -r '/srv/t/x y/cache'")
    assert seed(box, source, "/srv/t/x y/cache", sentinel="/srv/t/x y/.done", ask=True)["lacks"]
    box.guest("mkdir -p ~/t/c; touch ~/t/c/done")
    assert seed(box, source, "~/t/c", sentinel="~/t/c/done", ask=True)["lacks"]
    # A single file; a target behind a link of the user's; what is there already.
    seed(box, source / "file", "~/t/one")
    assert box.guest("cat ~/t/one") == "1"
    box.guest("mkdir ~/t/real; echo own >~/t/real/own; echo old >~/t/real/file; ln -s real ~/t/link")
    seed(box, source, "~/t/link")
    assert box.guest("cat ~/t/real/own ~/t/real/file; readlink ~/t/link") == "own\n1real\n"
    # With force it follows the source, and what the guest has changed by then is the guest's.
    (source / "second").write_bytes(b"2")
    seed(box, source, "~/t/link", force=True)
    box.guest("echo changed >~/t/real/second")
    (source / "second").unlink()
    (source / "file").unlink()
    (source / "third").write_bytes(b"3")
    seed(box, source, "~/t/link", force=True)
    assert box.guest("cd ~/t/real; ls; cat second third") == "own\nsecond\nthird\nchanged\n3"
    # A file where a directory is to be, and a directory where a file is.
    box.guest("touch ~/t/file; mkdir ~/t/directory; touch ~/t/directory/x")
    assert "cannot be put to their place" in refused(box, source, "~/t/file")
    assert "cannot be put to their place" in refused(box, source / "third", "~/t/directory")
    assert box.guest("ls ~/t/directory") == "x\n"


def test_a_source_that_is_not_as_it_was(box: Workspace, tmp_path: Path) -> None:
    source = files(tmp_path / "s", 300)
    later = "real = stream.choose_by\ndef choose(*args):\n    {}\n    return real(*args)\nstream.choose_by = choose"
    last = "(source / 'org0' / 'module-2' / '299.jar')"
    for change in (f"{last}.write_bytes(b'other')", f"{last}.unlink()", "(source / 'org0' / 'new').touch()"):
        assert "changed while it was read: org0" in refused(box, source, before=later.format(change))
        assert box.guest("ls -A ~/t/cache 2>/dev/null || echo none") == "none\n"
    assert "is not there" in refused(box, tmp_path / "none")
    seed(box, source)
    assert in_guest(box, "~/t/cache") == on_host(source)


def test_a_full_disk_is_told_and_nothing_is_left_of_it(box: Workspace, tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    (source / "large").write_bytes(os.urandom(64 << 20))
    box.guest("mkdir ~/t; fallocate -l $(($(df --output=avail -B1 ~ | tail -n 1) - (40 << 20))) ~/t/filler")
    free = "df --output=avail ~ | tail -n 1"
    before = int(box.guest(free))
    said = refused(box, source)
    assert "the machine's disk is full: it has " in said
    assert "[resources] disk" in said
    # What cannot be known beforehand: the disk fills up meanwhile.
    said = refused(box, source, before="seed._check_space = lambda *args: None")
    assert "the machine's disk is full" in said
    assert int(box.guest(free)) > before - 2048, "what had come is still there (KiB)"
    assert box.guest("ls -A ~/t") == "filler\n"
    assert "the machine's disk is full" in box("cp", str(source), "guest:t/copy", code=1).stderr
    box.guest("rm -rf ~/t/filler ~/t/copy")
    seed(box, source)
    assert in_guest(box, "~/t/cache") == on_host(source)


def test_copies_have_the_names_that_cp_gives(box: Workspace, tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "f").write_bytes(b"f")
    (tmp_path / "g h").write_bytes(b"g")
    box.guest("mkdir ~/t")
    box("cp", str(tmp_path / "d"), str(tmp_path / "g h"), "GUEST:t")
    box("cp", str(tmp_path / "d"), "box:t/new")
    box("cp", f"{tmp_path}/d/.", "guest:~/t/new")
    box("cp", f"host:{tmp_path / 'g h'}", "guest:t/it's")
    found = box.guest("cd ~/t; find . | sort").split("\n")
    assert found == [".", "./d", "./d/e", "./d/e/f", "./g h", "./it's", "./new", "./new/e", "./new/e/f", ""]
    out = tmp_path / "out"
    out.mkdir()
    box("cp", "guest:t/d", "guest:t/g h", str(out))
    box("cp", "guest:t/d/.", f"host:{out / 'as'}")
    box("cp", "guest:t/it's", str(out / "d" / "e" / "f"))
    assert (out / "d" / "e" / "f").read_bytes() == (out / "g h").read_bytes() == b"g"
    assert (out / "as" / "e" / "f").read_bytes() == b"f"
    for words, code, what in (
        (("guest:t", "guest:u"), 2, "both in guests"),
        (("a", "b"), 2, "both on this host"),
        (("guest:a", str(tmp_path), "guest:b"), 2, "not all of one side"),
        (("guest:t/none", str(out)), 1, "it is not there"),
        ((str(tmp_path / "none"), "guest:t"), 1, "is not there"),
        ((str(out), "guest:no/such/place"), 1, "no such directory in the guest"),
        ((str(out), str(tmp_path / "g h"), "guest:t/none"), 2, "need a directory"),
        (("guest:t/d", "guest:t/g h", str(out / "none")), 2, "need a directory"),
        (("guest:t/d", str(out / "no" / "place")), 1, "No such file"),
        (("guest:/root/x", str(out)), 1, "it is not there"),
    ):
        assert what in box("cp", *words, code=code).stderr, words


@pytest.mark.parametrize("way", ["to the guest", "from the guest"])
def test_ctrl_c_ends_the_guests_tar_as_well(box: Workspace, tmp_path: Path, way: str) -> None:
    box.guest("mkdir ~/t; fallocate -l 100M ~/t/large")
    (tmp_path / "large").write_bytes(os.urandom(100 << 20))
    words = (
        (str(tmp_path / "large"), "guest:t/x") if way == "to the guest" else ("guest:t/large", str(tmp_path / "x"))
    )
    process = box.start("cp", *words)
    try:
        eventually(lambda: box.guest("ps -eo comm= | grep -cx tar || :").strip() != "0", "tar to begin")
    finally:
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 130, err
    if way == "from the guest":
        assert not (tmp_path / "x").exists()


ATTACKS = [
    *("absolute name", "dots", "dots by a sparse name", "through a link of its own", "hard link outside"),
    *("huge pax header", "truncated data", "not tar at all"),
]


def test_a_guest_that_cheats_reaches_nothing(box: Workspace, tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "outside" / "target"
    target.mkdir(parents=True)
    (outside / "victim").write_bytes(b"stays")
    (target / "way out").symlink_to(outside)
    before = tree(outside)
    archives = {what: HOSTILE[what] + (b"" if what.startswith("truncated") else END) for what in ATTACKS}
    archives["through a link that is there"] = member(b"way out/victim", data=b"x") + END
    archives["goes on"] = member(b"f", data=b"x") + END + bytes(4 << 20)
    for number, archive in enumerate(archives.values()):
        (tmp_path / f"{number}.tar").write_bytes(archive)
    box.guest("mkdir -p ~/t/d")
    box("cp", *(str(tmp_path / f"{number}.tar") for number in range(len(archives))), "guest:t")
    tar = '#!/bin/sh\\nprintf "\\\\033[2Jevil\\\\n" >&2\\nexec cat ~/t/now.tar\\n'
    box.guest(
        f"printf {shlex.quote(tar)} | sudo tee /usr/local/bin/tar >/dev/null; sudo chmod 755 /usr/local/bin/tar"
    )
    try:
        for number, what in enumerate(archives):
            box.guest(f"cp ~/t/{number}.tar ~/t/now.tar")
            done = box("cp", "guest:t/d/.", str(target), code=1)
            assert "error: " in done.stderr, what
            assert "\x1b" not in done.stderr + done.stdout
            for name in ("f", "in", "ok", "h"):
                (target / name).unlink(missing_ok=True)
            if (target / "a").is_dir():
                (target / "a").rmdir()
            assert {name: facts[0] for name, facts in tree(outside).items()} == (
                {name: facts[0] for name, facts in before.items()}
            ), what
            assert (outside / "victim").read_bytes() == b"stays"
    finally:
        box.guest("sudo rm /usr/local/bin/tar")
    assert not Path("/tmp/nixbox-evil").exists()
