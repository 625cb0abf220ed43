"""The Nix text itself; that Nix reads it back as the same value is tests/nix/test_nixexpr_eval.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nixbox.plan.nixexpr import Call, Raw, Value, render

KEYWORDS = ["if", "then", "else", "assert", "with", "let", "in", "rec", "inherit", "or"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (1, "1"),
        (-1, "-1"),
        ("", '""'),
        ("a", '"a"'),
        ('say "hi" \\ ${x} $y $${z}', r'"say \"hi\" \\ \${x} $y $\${z}"'),
        ("tab\tcr\rnl\n", r'"tab\tcr\rnl\n"'),
        ("''${x}''", r'''"''\${x}''"'''),
        ([], "[ ]"),
        ((), "[ ]"),
        ({}, "{ }"),
        ([-1, [1], "a", None, True], '[ (-1) [ 1 ] "a" null true ]'),
        ({"a": 1}, "{\n  a = 1;\n}"),
        (Path("/nix/store/a-b_c+d.1"), "/nix/store/a-b_c+d.1"),
        (Path("/"), '/. + "/"'),
        (Path("/with space/${x}"), r'/. + "/with space/\${x}"'),
        (Path("//two"), '/. + "//two"'),
        ([Path("/a b")], '[ (/. + "/a b") ]'),
        (Raw("pkgs.jq"), "pkgs.jq"),
        (Call("f", 1), "f 1"),
        (Call("f", -1), "f (-1)"),
        (Call("f", Call("g", 1)), "f (g 1)"),
        (Call(Call("import", Path("/i.nix")), {}), "import /i.nix { }"),
        (Call(Path("/a b"), {}), '(/. + "/a b") { }'),
        ([Call("f", 1)], "[ (f 1) ]"),
        ("one\ntwo", 'builtins.concatStringsSep "\\n" [\n  "one"\n  "two"\n]'),
        (["one\ntwo"], '[\n  (builtins.concatStringsSep "\\n" [\n    "one"\n    "two"\n  ])\n]'),
    ],
)
def test_text(value: Any, text: str) -> None:
    assert render(value) == text


@pytest.mark.parametrize("key", ["a", "_x", "a-b", "a'", "A1", "pname"])
def test_plain_keys(key: str) -> None:
    assert render({key: 1}) == f"{{\n  {key} = 1;\n}}"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "1a",
        "a.b",
        "a b",
        "é",
        "-a",
        "'a",
        "a\n",
        *KEYWORDS,
    ],
)
def test_other_keys_are_quoted(key: str) -> None:
    assert render({key: 1}).startswith('{\n  "')


def test_a_whole_file_is_readable() -> None:
    script = 'set -eu\nif [ -n "${HOME}" ]; then\n\techo "$HOME"\nfi\n'
    spec: Value = {
        "name": "box",
        "packages": ["jq", "git"],
        "build": script,
        "debs": [{"sha256": "0" * 64}] * 2,
    }
    assert render(Call(Call("import", Path("/x/image.nix")), {"spec": spec, "debug": False})) == (
        r"""import /x/image.nix {
  spec = {
    name = "box";
    packages = [ "jq" "git" ];
    build = builtins.concatStringsSep "\n" [
      "set -eu"
      "if [ -n \"\${HOME}\" ]; then"
      "\techo \"$HOME\""
      "fi"
      ""
    ];
    debs = [
      {
        sha256 = "0000000000000000000000000000000000000000000000000000000000000000";
      }
      {
        sha256 = "0000000000000000000000000000000000000000000000000000000000000000";
      }
    ];
  };
  debug = false;
}"""
    )


@pytest.mark.parametrize(
    "value",
    ["a\0b", {"a\0": 1}, "\udc80", "x\ny\udc80", {"\udc80": 1}, 2**63, -(2**63), Path("rel"), Path("/a\0b")],
)
def test_what_nix_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Nix|UTF-8|relative"):
        render(value)


@pytest.mark.parametrize("value", [1.5, b"x", {1, 2}, object(), {1: 2}, {None: 1}, iter([])])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        render([value])


@pytest.mark.parametrize(
    "text", ["", "a b", "a; b", "${x}", "a.", ".a", "a..b", "1a", "if", "a.in", "a\n", "(x)", "a/b", 'a."b"']
)
def test_only_a_reference_is_raw(text: str) -> None:
    with pytest.raises(ValueError, match="not a Nix reference"):
        Raw(text)
    with pytest.raises(ValueError, match="not a Nix reference"):
        render(Call(text, 1))


def test_importing_it_is_pure_standard_library() -> None:
    code = "import sys, nixbox.plan.nixexpr; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    third_party = set(loaded.stdout.split()) & {"pydantic", "tomlkit", "typer", "sh", "cffi"}
    assert third_party == set()
