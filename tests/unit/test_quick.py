"""Command lines that are read without the parser mean what the parser takes them for; all others are left to it."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from nixbox import cli, paths
from nixbox.cli import machines, options, parser, quick

PARSER: Any = typer.main.get_command(parser.app)
OURS: dict[str, Any] = {
    name: one for name, one in PARSER.commands.items() if getattr(one.callback, "__module__", "") == machines.__name__
}
TABLE = quick.described(OURS)
VALUES = {"text": "some text", "integer": "12", "float": "2.5"}
HANG_S = 60.0


def lines() -> list[list[str]]:
    """Each spelling of each option by itself, before an argument and after it; and some from life."""
    found = []
    for name, (_, spellings, argument, many, required, _) in TABLE.items():
        arguments = [] if argument is None else [["--", "-x", "y"]] if many else [["box"], ["--", "box"]]
        if not required:
            arguments.append([])
        for after in arguments:
            found.append([name, *after])
            for spelling, (_, kind, *_) in spellings.items():
                option = [spelling, VALUES[kind]] if kind else [spelling]
                found.append([name, *option, *after])
                if kind and spelling.startswith("--"):
                    found.append([name, "=".join(option), *after])
                if after == ["box"]:
                    found.append([name, *after, *option])
    return [
        *found,
        ["run", "--", "make", "test"],
        ["run", "ls", "-la", "--", "--tty"],
        ["run", "--no-tty", "-e", "A=1", "--env", "B==2", "-e", "A=3", "-w", "/tmp", "--", "sh", "-c", "exit 3"],
        ["run", "--tty", "--no-tty", "true"],
        ["run", "--timeout", "3", "true"],
        ["run", "--workdir=", "true"],
        ["run", "-w", "/a", "-w", "/b", "echo", "ä", ""],
        ["up", "box", "--json", "--cpus", "2", "--memory=1GiB", "-p", "dev", "--env-from-host", "A"],
        ["up", "--", "--json"],
        ["logs", "-f", "box"],
    ]


def without_defaults(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """What was left out has the function's own default, which the parser hands over; of a list, an empty one."""
    defaults = {name: one.default for name, one in inspect.signature(function).parameters.items()}
    return {
        name: list(value) if isinstance(value, (list, tuple)) else value
        for name, value in given.items()
        if value != defaults[name] and value not in ([], ())
    }


@pytest.mark.parametrize("words", lines(), ids=" ".join)
def test_it_means_what_the_parser_takes_it_for(words: list[str]) -> None:
    command = OURS[words[0]]
    expected = without_defaults(command.callback, command.make_context(words[0], words[1:]).params)
    found = quick.call(TABLE, words)
    assert found is not None
    assert found[0] == command.callback.__name__
    assert without_defaults(command.callback, found[1]) == expected


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--help",
        "version",
        "up --help",
        "up -h",
        "up a b",
        "up --nothing",
        "up --json=yes",
        "up --cpus",
        "up --cpus two",
        "up --cpus=",
        "up --cpus -1",
        "up --cpus 1.5",
        "up --cpus ٣",
        "up --memory --json",
        "up -pdev",
        "up -p=dev",
        "up -",
        "up --js",
        "run",
        "run --",
        "run --timeout 1.2.3 true",
        "run --timeout . true",
        "run --timeout 1e3 true",
        "run -",
        "fork --count 2",
        "status --json --verbose",
        "list box",
        "image list",
    ],
)
def test_all_else_is_the_parsers(line: str) -> None:
    assert quick.call(TABLE, line.split()) is None


def test_every_command_of_machines_is_read() -> None:
    assert set(TABLE) == set(OURS)
    left = {
        f"{name} {word}"
        for name, one in OURS.items()
        for option in one.params
        if option.param_type_name == "option"
        for word in (*option.opts, *option.secondary_opts)
        if word not in TABLE[name][1]
    }
    assert left == {"fork --count", "fork -n"}  # a number with bounds


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nixbox" / "commands"


def test_what_the_parser_wrote_down_is_found(cache: Path) -> None:
    assert quick.table() is None
    quick.keep(OURS)
    found = quick.table()
    assert found is not None
    assert quick.call(found, ["up", "--json"]) == ("up", {"as_json": True})
    assert cache.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"of": 1, "commands": {}}', "\udcff"])
def test_a_damaged_one_is_none(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_bytes(text.encode(errors="surrogateescape"))
    assert quick.table() is None


def test_another_nixboxs_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.keep(OURS)
    monkeypatch.setattr(quick, "__version__", "99")
    assert quick.table() is None


def test_a_cache_that_cannot_be_written_is_none(cache: Path) -> None:
    cache.parent.write_text("in the way")
    quick.keep(OURS)
    assert quick.table() is None


def test_a_function_gets_its_types_where_the_parser_needs_them() -> None:
    assert machines.down.__annotations__["name"] == options.Name


def test_the_second_command_line_loads_no_parser(tmp_path: Path) -> None:
    """And both end alike, with the same words."""
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys, atexit; sys.argv = ['nixbox', 'status']; from nixbox.cli import main\n"
    code += "try: main()\nfinally: print('typer' in sys.modules, 'inspect' in sys.modules)"
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        for _ in range(2)
    ]
    assert [one.stdout.split() for one in said] == [["True", "True"], ["False", "False"]]
    assert said[0].returncode == said[1].returncode == 2
    assert said[0].stderr == said[1].stderr
    assert "nixbox init" in said[0].stderr


@pytest.mark.parametrize("round_", ["by the parser", "without it"])
@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 0, ""),
        (OSError(28, "No space left on device", "/a"), 1, "error: No space left on device: /a"),
        (ZeroDivisionError("x"), 1, "error: this is a fault in nixbox: ZeroDivisionError: x"),
    ],
    ids=["ctrl-c", "pipe", "disk", "fault"],
)
def test_an_end_is_the_same_either_way(
    round_: str,
    raised: BaseException,
    code: int,
    words: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if round_ == "without it":
        quick.keep(OURS)

    def fail(_: object) -> None:
        raise raised

    monkeypatch.setattr(paths, "find_workspace", fail)
    monkeypatch.setattr(sys, "argv", ["nixbox", "list"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert capfd.readouterr().err.startswith(words)
    assert (quick.table() is not None) == cache.exists()


def test_a_short_command_imports_little(tmp_path: Path) -> None:
    """What these would cost is told in docs/decisions/037."""
    (tmp_path / ".nixbox").mkdir()
    (tmp_path / ".nixbox" / "config.toml").write_text('name = "box"\n')
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys; sys.argv = ['nixbox', 'run', 'true']; from nixbox.cli import main\n"
    code += "try: main()\nfinally: print(*sys.modules)"
    argv = [sys.executable, "-c", code]
    for _ in range(2):
        said = subprocess.run(
            argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HANG_S, check=False
        )
        assert "there is no machine `box`" in said.stderr
    heavy = {"typer", "typing", "tomllib", "tempfile", "ctypes", "inspect", "dataclasses", "pydantic", "platform"}
    heavy |= {"shutil", "bz2", "hashlib", "_hashlib", "struct", "nixbox.light"}
    assert heavy & set(said.stdout.split()) == set()
