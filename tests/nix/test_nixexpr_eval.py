"""Nix itself reads back what nixbox.plan.nixexpr writes: properties over arbitrary values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nixbox.plan import nixexpr
from nixbox.plan.nixexpr import Call, Raw, Value, render
from nixbox.run import run

pytestmark = pytest.mark.skipif(shutil.which("nix-instantiate") is None, reason="no nix-instantiate on this host")

Evaluate = Callable[[Value], Any]


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluate]:
    conf = tmp_path_factory.mktemp("nix-conf")
    (conf / "nix.conf").write_text("experimental-features = nix-command flakes\nsubstituters =\n")
    # The dummy store: evaluation alone, which writes nothing anywhere.
    env = {"NIX_CONF_DIR": str(conf), "NIX_REMOTE": "dummy://"}

    def evaluate(value: Value) -> Any:
        argv = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
        return json.loads(run(argv, stdin=render(value), env=env, timeout_s=60).stdout)

    yield evaluate


# Every character that UTF-8 can hold but NUL, with those that mean something to Nix much likelier.
CHARACTERS = st.sampled_from("$\\{}\"'\n\r\t #/;é𝄞\x01\x7f\x85\u2028") | st.characters(
    codec="utf-8", exclude_characters="\0"
)
TEXT = st.text(CHARACTERS, max_size=30) | st.sampled_from(
    [
        "$${x}",
        "$$${x}",
        "\\${x}",
        "\\\\${x}",
        "''${x}''",
        "''",
        "'''",
        "${",
        "$",
        "\\",
        "\n",
        "\r\n",
        "a\n\n",
        " a\n  b\n",
    ]
)
KEYWORDS = [*sorted(nixexpr._KEYWORDS), "null", "true", "false", "import", "builtins", "__curPos"]
# These two mean something to toJSON itself: no renderer can make them plain data.
KEYS = (TEXT | st.sampled_from(KEYWORDS)).filter(lambda key: key not in ("outPath", "__toString"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
PARTS = TEXT.filter(lambda part: "/" not in part and part not in ("", ".", ".."))
# No shrinking: each step would start Nix anew.
QUICK = settings(
    max_examples=12,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@QUICK
@given(st.lists(TEXT, min_size=100, max_size=300))
def test_text_comes_back(evaluate: Evaluate, texts: list[str]) -> None:
    assert evaluate(texts) == texts


@QUICK
@given(st.lists(VALUES, min_size=30, max_size=80))
def test_nested_values_come_back(evaluate: Evaluate, values: list[Any]) -> None:
    assert evaluate(values) == values


@QUICK
@given(st.lists(VALUES, min_size=20, max_size=40))
def test_values_come_back_through_calls(evaluate: Evaluate, values: list[Any]) -> None:
    # An argument has to be one term: this is where a missing parenthesis shows.
    calls = [Call(Call("builtins.seq", None), value) for value in values]
    assert evaluate(calls) == values


@QUICK
@given(st.lists(st.lists(PARTS, min_size=1), min_size=20))
def test_paths_come_back(evaluate: Evaluate, paths: list[list[str]]) -> None:
    expected = ["/" + "/".join(parts) for parts in paths]
    assert evaluate([Call("toString", Path(path)) for path in expected]) == expected


def test_a_long_script_comes_back(evaluate: Evaluate) -> None:
    script = "".join(f'\techo "line {i} of ${{HOME}}" \\\n' for i in range(20_000))
    assert evaluate({"build": script}) == {"build": script}


def test_references_are_code_and_text_is_not(evaluate: Evaluate) -> None:
    assert evaluate([Raw("builtins.nixVersion"), "builtins.nixVersion", "${builtins.nixVersion}"])[1:] == [
        "builtins.nixVersion",
        "${builtins.nixVersion}",
    ]
