"""`nixbox docs`: where its site comes from, when it is built, and how it is shown."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pty
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nixbox import __version__, cli, paths

ROOT = Path(__file__).parents[2]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of this user's sites, on a host without a desktop."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    for variable in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache/nixbox/docs"


@pytest.fixture
def call(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`nixbox docs` in this process: exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nixbox", "docs", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return int(caught.value.code), out, err

    return call


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a small site of its own."""
    place = tmp_path / "sources"
    (place / "docs").mkdir(parents=True)
    (place / "mkdocs.yml").write_text("site_name: small\ntheme: material\nuse_directory_urls: false\n")
    (place / "docs/index.md").write_text("# Small\n")
    monkeypatch.setattr(paths, "docs_dir", lambda: place)
    return place


def other_process(*words: str, code: str = "pass") -> list[str]:
    """The command line of nixbox as a program; `code` is run before."""
    main = f"import sys; {code}; sys.argv = ['nixbox', *sys.argv[1:]]; from nixbox.cli import main; main()"
    return [sys.executable, "-c", main, *words]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def test_it_is_built_once(call: Call, cache: Path) -> None:
    place = cache / __version__
    code, out, err = call("--path")
    assert (code, out) == (0, f"{place}\n") and "building" in err
    assert "<title>nixbox</title>" in (place / "index.html").read_text()
    assert (place / "reference/cli.html").is_file() and (place / "decisions/index.html").is_file()
    before = place.stat().st_ino
    for words, said in (((), "index.html"), (("--no-open",), "index.html"), (("--path",), "")):
        code, out, err = call(*words)
        assert (code, out, err) == (0, f"{place / said}\n", "")
    assert place.stat().st_ino == before
    assert [path.name for path in cache.iterdir()] == [__version__]


def test_it_follows_its_sources(call: Call, sources: Path, cache: Path) -> None:
    call("--path")
    (sources / "docs/more.md").write_text("# More\n")
    for left in ("new", "old"):  # by one that was killed
        (cache / f".{__version__}.{left}").mkdir()
        (cache / f".{__version__}.{left}" / ".half").write_text("")
    assert call("--path")[0] == 0
    assert (cache / __version__ / "more.html").is_file()
    assert [path.name for path in cache.iterdir()] == [__version__]
    assert not (cache / __version__ / ".half").exists()


def test_a_build_that_fails_leaves_what_was_there(call: Call, sources: Path, cache: Path) -> None:
    call("--path")
    before = (cache / __version__ / "index.html").read_text()
    (sources / "late.py").write_text("def on_post_build(config):\n    raise ValueError('late fault')\n")
    with (sources / "mkdocs.yml").open("a") as file:
        file.write("hooks: [late.py]\n")
    code, out, err = call()
    assert (code, out) == (1, "") and "late fault" in err and "mkdocs build" in err
    assert (cache / __version__ / "index.html").read_text() == before
    assert [path.name for path in cache.iterdir()] == [__version__]


def test_without_mkdocs(call: Call, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = call()
    assert (code, out) == (3, "")
    assert "mkdocs-material" in err and "pip install 'nixbox[docs]'" in err and str(ROOT / "docs") in err
    assert not cache.exists()


def test_without_sources(call: Call, sources: Path) -> None:
    (sources / "mkdocs.yml").unlink()
    code, out, err = call()
    assert (code, out) == (3, "") and "without its documentation" in err


def test_a_cache_that_cannot_be_written(call: Call, sources: Path, cache: Path) -> None:
    cache.parent.mkdir(mode=0o700)
    cache.write_text("in the way")
    code, out, err = call()
    assert (code, out) == (1, "") and f"cannot write {cache}" in err


def test_two_at_once_build_one(sources: Path, cache: Path) -> None:
    code = f"from nixbox import paths; from pathlib import Path; paths.docs_dir = lambda: Path({str(sources)!r})"
    argv = other_process("docs", code=code)
    two = [
        subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert {out for out, _ in said} == {f"{cache / __version__ / 'index.html'}\n"}
    assert sum("building" in err for _, err in said) == 1
    assert [path.name for path in cache.iterdir()] == [__version__]


def test_ctrl_c_leaves_nothing(cache: Path) -> None:
    argv = other_process("docs")
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "building" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(cache.iterdir()) == []


# --- showing it ---


def on_terminal(**env: str) -> tuple[int, str]:
    """`nixbox docs` on a terminal: its exit code, and what was on the screen."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        other_process("docs"), env=environment(**env), stdin=slave, stdout=slave, stderr=slave
    ) as one:
        os.close(slave)
        seen = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while piece := os.read(master, 4096):
                seen += piece
        code = one.wait(60)
    os.close(master)
    return code, seen.decode().replace("\r\n", "\n")


@pytest.fixture
def browser(tmp_path: Path) -> Callable[[int], str]:
    """A PATH with a program that shows files and ends with the given code; it notes what it was given."""

    def made(code: int) -> str:
        program = tmp_path / "bin/xdg-open"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/opened\nexit {code}\n')
        program.chmod(0o755)
        return f"{program.parent}:{os.environ['PATH']}"

    return made


@pytest.mark.skipif(sys.platform != "linux", reason="xdg-open is Linux's")
def test_it_is_opened_in_the_browser(
    call: Call, cache: Path, browser: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("--path")
    page, opened = cache / __version__ / "index.html", tmp_path / "opened"
    assert on_terminal(PATH=browser(0), DISPLAY=":7") == (0, f"opened {page}\n")
    assert opened.read_text() == f"{page}\n"
    # Where nothing can be opened, or nobody is there to see it, the path is said.
    opened.unlink()
    assert on_terminal(PATH=browser(0)) == (0, f"{page}\n")
    monkeypatch.setenv("DISPLAY", ":7")
    monkeypatch.setenv("PATH", browser(0))
    assert call() == (0, f"{page}\n", "")
    assert not opened.exists()
    assert on_terminal(PATH=browser(4), DISPLAY=":7") == (0, f"{page}\n")
    assert opened.exists()


# --- as it is installed ---


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package as its wheel has it, and no checkout around it."""
    place = tmp_path_factory.mktemp("installed")
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site-packages")
    return place / "site-packages"


def test_a_wheel_has_all_that_the_site_is_made_of(installed: Path, cache: Path) -> None:
    argv = other_process("docs", "--path")
    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(argv, env=env, cwd=installed, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"{cache / __version__}\n"), done.stderr
    ours = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    missing = [str(path) for path in ours if not (cache / __version__ / path).is_file()]
    assert missing == []
    assert (cache / __version__ / "plugins/claude-code.html").is_file()
    assert not [path for path in installed.rglob("*") if "__pycache__" in path.parts and "_docs" in path.parts]


def test_a_package_may_bring_the_site(installed: Path, cache: Path, tmp_path: Path) -> None:
    """As a distribution's would, which has mkdocs when it is made and not where it is used."""
    shipped = installed / "nixbox/_docs/site"
    shipped.mkdir()
    try:
        (shipped / "index.html").write_text("<title>nixbox</title>")
        argv = other_process("docs", code="sys.modules['mkdocs'] = None")
        env = os.environ | {"PYTHONPATH": str(installed)}
        done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, f"{shipped}/index.html\n"), done.stderr
        assert not cache.exists()
    finally:
        (shipped / "index.html").unlink()
        shipped.rmdir()
