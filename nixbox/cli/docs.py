"""`nixbox docs`: the documentation as a site on this host."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nixbox.errors import HostError, NixboxError

_STAMP = ".nixbox-sources"  # in a site that was built here: what it was built from
_CONFIG = "mkdocs.yml"
_BUILD_S = 300.0


def docs(
    path: Annotated[bool, typer.Option("--path", help="Print the directory of the site, and open nothing.")] = False,
    no_open: Annotated[bool, typer.Option("--no-open", help="Print the path of its first page.")] = False,
) -> None:
    """Open the documentation in the browser. It is built when it is first asked for, and needs no network."""
    place = _site()
    if path:
        print(place)
        return
    page = place / "index.html"
    opener = None if no_open or not sys.stdout.isatty() else _opener()
    if opener is None or not _opened(opener, page):
        print(page)


def _site() -> Path:
    """The directory of a site that is up to date. Raises HostError, NixboxError."""
    from nixbox import __version__, paths

    sources = paths.docs_dir()
    shipped = sources / "site"
    if sources.name == "_docs" and (shipped / "index.html").is_file():
        return shipped  # a package that was built with it; in a checkout it may be of any age
    if not (sources / _CONFIG).is_file():
        raise HostError(
            "this installation of nixbox came without its documentation", hint="read docs/ in nixbox's repository"
        )
    place = paths.cache_dir() / "docs" / __version__
    stamp = _stamp(sources)
    if not _is_built(place, stamp):
        _build(sources, place, stamp)
    return place


def _is_built(place: Path, stamp: str) -> bool:
    try:
        return (place / _STAMP).read_text() == stamp
    except OSError:
        return False


def _stamp(sources: Path) -> str:
    """A digest of names, sizes and times of all that the site is made of: the pages, the plugins, the code."""
    import hashlib

    from nixbox import paths

    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for top in (sources / _CONFIG, sources / "README.md", sources / "docs", paths.plugins_dir(), package):
        for file in _files(top):
            info = file.stat()
            digest.update(f"{file}\0{info.st_size}\0{info.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(top: Path) -> Iterator[Path]:
    if top.is_file():
        yield top
    for file in sorted(top.rglob("*")):
        if "__pycache__" not in file.parts and file.is_file():
            yield file


def _build(sources: Path, place: Path, stamp: str) -> None:
    """Build the site at `place`, whole or not at all. Raises HostError without mkdocs, NixboxError."""
    import importlib.util
    import shutil

    from nixbox import paths, run
    from nixbox.cli.common import reporter

    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        raise HostError(
            "the documentation is built by mkdocs-material, which is not installed beside nixbox",
            hint=f"pip install 'nixbox[docs]'; or read {sources / 'docs'}",
        )
    argv = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", str(sources / _CONFIG)]
    # What imports nixbox here imports it there, installed or not, and leaves nothing beside the sources.
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "NO_MKDOCS_2_WARNING": "1",
    }
    try:
        paths.private_dir(paths.cache_dir())
        with _alone(place.parent):
            if _is_built(place, stamp):  # meanwhile, by another one
                return
            made, old = (place.with_name(f".{place.name}.{word}") for word in ("new", "old"))
            for left in (made, old):
                shutil.rmtree(left, ignore_errors=True)  # by one that was killed
            report = reporter()
            report.phase("building the documentation")
            try:
                run.run([*argv, "--site-dir", str(made)], timeout_s=_BUILD_S, env=env, cwd=place.parent)
                (made / _STAMP).write_text(stamp)
                if place.exists():
                    place.rename(old)
                made.rename(place)
            finally:
                report.done()
                for left in (made, old):
                    shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise NixboxError(f"cannot write {error.filename or place}: {error.strerror}") from error


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Nobody else builds in `directory` meanwhile; it is made if it is not there."""
    import fcntl

    directory.mkdir(exist_ok=True)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _opener() -> str | None:
    """The program that shows a file in the user's browser; None where there is no desktop."""
    from nixbox import run

    if sys.platform == "darwin":
        return run.find_tool("open")
    desktop = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    return run.find_tool("xdg-open") if desktop else None


def _opened(opener: str, page: Path) -> bool:
    """Show a page; says so, or False when that program could not."""
    from nixbox import run

    code = run.on_host([opener, str(page)], env=os.environ, cwd=page.parent)
    if code == 0:
        print(f"opened {page}", file=sys.stderr)
    return code == 0
