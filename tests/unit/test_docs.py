"""The documentation: its site builds, and what it says about commands, files and tests is so."""

from __future__ import annotations

import html
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from nixbox import paths
from nixbox.cli import site
from nixbox.cli.parser import app
from nixbox.cli.reference import cli_reference
from nixbox.config import reference, schema, skeleton
from nixbox.config.load import RESERVED
from nixbox.errors import ExitCode

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PLUGINS = {path.parent.name: path for path in (ROOT / "plugins").glob("*/plugin.toml")}
# What a user follows. Decisions are history: what they say was so on their day.
PAGES = sorted(
    [
        *(path for path in DOCS.rglob("*.md") if "decisions" not in path.parts),
        *(path.with_name("README.md") for path in PLUGINS.values()),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/hello/README.md")),
    ]
)
ROOT_COMMAND: Any = typer.main.get_command(app)
MODELS: dict[str, Any] = {
    r"(.*/)?config\.toml": schema.Config,
    r"(.*/)?profiles/[^/]+\.toml": schema.Profile,
    r"(.*/)?plugin\.toml": schema.Plugin,
    r"(.*/)?settings\.toml": schema.UserSettings,
}


# --- reading pages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of code: what its fence says ("" for one that is only indented), and what is in it."""

    info: str
    text: str


def split(text: str) -> tuple[list[Block], str]:
    """The blocks of code of a page, and what is beside them."""
    blocks: list[Block] = []
    beside: list[str] = []
    lines = iter(text.splitlines())
    indented: list[str] = []
    for line in lines:
        fence = re.fullmatch(r"( *)```(.*)", line)
        if fence:
            inside: list[str] = []
            for one in lines:
                if one.strip() == "```":
                    break
                inside.append(one.removeprefix(fence[1]))
            blocks.append(Block(fence[2].strip(), "\n".join(inside)))
        elif line.startswith("    ") and (indented or not (beside and beside[-1].strip())):
            indented.append(line[4:])
        else:
            if indented:
                blocks.append(Block("", "\n".join(indented)))
                indented = []
            beside.append(line)
    if indented:
        blocks.append(Block("", "\n".join(indented)))
    return blocks, "\n".join(beside)


def shell_lines(block: Block) -> Iterator[str]:
    """The lines of a block that are for a shell, continued ones as one, without comments."""
    language = block.info.partition(" ")[0]
    text = re.sub(r"\\\n\s*", " ", block.text)
    for line in text.splitlines():
        line = re.sub(r"(^|\s)# .*", "", line)
        if language in ("sh", "shell", "bash"):
            yield line
        elif language == "console" and line.startswith("$ "):
            yield line[2:]
        elif language == "yaml" and re.match(r"\s*(- )?(run: )?(nixbox|make) ", line):  # of a CI system
            yield re.sub(r"^\s*(- )?(run: )?", "", line)
        elif not language and re.match(r"(nixbox|make) ", line):
            yield line


# What stands before a command in a line of shell.
BEFORE = re.compile(r"(if|then|else|while|until|do|!|time|exec|env|[A-Za-z_][A-Za-z0-9_]*=.*)")


def commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a line of shell, those in `$(…)` too."""
    for inner in re.findall(r"\$\(([^()]*)\)", line):
        yield from commands(inner)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|<>()"):
            while words and BEFORE.fullmatch(words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
        else:
            words.append(word)


# --- what is wrong with a command ------------------------------------------------------------------------


def plugin_commands(toml: str) -> set[str]:
    return {one["name"] for one in tomllib.loads(toml).get("commands", [])}


def fault(words: list[str], plugins: dict[str, set[str]]) -> str | None:
    """What is wrong with a command of nixbox or make, which is not run; None if nothing is, or it is another's."""
    if words[:1] == ["make"]:
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wanted = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        return next((f"no target {word}" for word in wanted if word not in targets), None)
    if words[:2] == ["nix", "run"] and "--" in words and "#nixbox" in words[2]:
        words = ["nixbox", *words[words.index("--") + 1 :]]
    if words[:1] != ["nixbox"]:
        return None
    rest = words[1:]
    if rest[:1] == ["--debug"]:
        rest = rest[1:]
    if rest and rest[0] in plugins:
        named = rest[1] if len(rest) > 1 else ""
        return None if named in plugins[rest[0]] else f"the plugin {rest[0]} has no command {named!r}"
    command, path = ROOT_COMMAND, "nixbox"
    while getattr(command, "commands", None) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"{path} has no command {rest[0]}"
        command, path, rest = command.commands[rest[0]], f"{path} {rest[0]}", rest[1:]
    if getattr(command, "commands", None) and not rest:
        return f"{path}: which command?"
    try:
        command.make_context(path, rest)  # parses all that follows, and calls nothing
    except typer.Exit:
        return None  # --help
    except Exception as error:
        if hasattr(error, "format_message"):
            return f"{path}: {error.format_message()}"
        raise
    return None


def span_fault(text: str, plugins: dict[str, set[str]]) -> str | None:
    """What is wrong with a command in running text, which may hold placeholders and be less than whole."""
    command, path = ROOT_COMMAND, "nixbox"
    words = text.split()[1:]
    while words and getattr(command, "commands", None) and re.fullmatch(r"[a-z][a-z0-9-]*", words[0]):
        if words[0] in plugins:
            named = words[1] if len(words) > 1 else "-"
            known = named in plugins[words[0]] or not re.fullmatch(r"[a-z][a-z0-9-]*", named)
            return None if known else f"the plugin {words[0]} has no command {named}"
        if words[0] not in command.commands:
            return f"{path} has no command {words[0]}"
        command, path, words = command.commands[words[0]], f"{path} {words[0]}", words[1:]
    known_options = {name for one in command.params for name in (*one.opts, *one.secondary_opts)} | {"-h", "--help"}
    if command is ROOT_COMMAND:
        known_options.add("--debug")
    for word in words:
        if word == "--":
            break
        option = word.strip("[]…").partition("=")[0]
        if option.startswith("-") and option not in known_options:
            return f"{path} has no option {option}"
    return None


def faults(text: str) -> list[str]:
    """All that is wrong with the commands on a page."""
    found = []
    blocks, beside = split(text)
    plugins = {name: plugin_commands(path.read_text()) for name, path in PLUGINS.items()}
    for name in re.findall(r"nixbox plugin new ([a-z-]+)", text):  # the reader has made it
        plugins[name] = plugin_commands(skeleton._TOML.substitute(name=name))
    for block in blocks:
        for line in shell_lines(block):
            found += [f"{line}: {wrong}" for words in commands(line) if (wrong := fault(words, plugins))]
    # What a page calls a plugin's in its own examples need not be one of nixbox's.
    own = {
        name: plugin_commands(block.text)
        for block in blocks
        if re.match(r'toml title="(.*/)?plugin.toml"', block.info)
        for name in re.findall(r"nixbox ([a-z-]+) [a-z-]+: ", block.text)
    }
    for span in re.findall(r"`(nixbox [^`]+)`", beside):
        if wrong := span_fault(span, plugins | own):
            found.append(f"`{span}`: {wrong}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_can_be_given(page: Path) -> None:
    assert faults(page.read_text()) == []


def test_commands_are_found_where_they_stand() -> None:
    here = [line for page in PAGES for block in split(page.read_text())[0] for line in shell_lines(block)]
    said = {tuple(words[:2]) for line in here for words in commands(line)}
    assert {("nixbox", "up"), ("nixbox", "claude-code"), ("nix", "run"), ("make", "setup"), ("make", "bench")} <= said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```sh\nnixbox upp\n```", "no command upp"),
        ("```sh\nnixbox up --colt\n```", "--colt"),
        ("```sh\nnixbox up one two\n```", "extra argument"),
        ("```sh\nnixbox mount .\n```", "Missing argument"),
        ("```sh\nnixbox fork --count many\n```", "many"),
        ("```sh\nnixbox net\n```", "which command?"),
        ("```sh\ncd x && FOO=1 nixbox net lock # all\n```", "no command lock"),
        ("```sh\nif ! nixbox stat; then :; fi\n```", "no command stat"),
        ('```bash\nimage="$(nixbox built --json)"\n```', "no command built"),
        ("```sh\nnixbox up \\\n  --nothing\n```", "--nothing"),
        ("```sh\nssh -F <(nixbox ssh-conf) box\n```", "no command ssh-conf"),
        ("```sh\nnix run .#nixbox -- upp\n```", "no command upp"),
        ("```console\n$ nixbox upp\nnixbox said this\n```", "no command upp"),
        ("```yaml\nsteps:\n  - run: nixbox up --colt\n```", "--colt"),
        ("```yaml\nsteps:\n  - run: |\n      nixbox up\n      make tests\n```", "no target tests"),
        ("```sh\nnixbox aws logout\n```", "aws has no command 'logout'"),
        ("```sh\nmake tests\n```", "no target tests"),
        ("so:\n\n    nixbox upp\n", "no command upp"),
        ("say `nixbox upp` now", "no command upp"),
        ("say `nixbox run --ephemereal -- CMD`", "no option --ephemereal"),
        ("say `nixbox plugin lists`", "no command lists"),
        ("say `nixbox aws logout`", "aws has no command logout"),
    ],
)
def test_a_wrong_command_is_found(text: str, words: str) -> None:
    (found,) = faults(text)
    assert words in found


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nnixbox run -w '~/workspace' -- sh -c 'nixbox upp; make nothing'\nother upp\n```",
        "```sh\nnixbox --debug up x --cold | tee log && make lint\n```",
        "```sh\nnixbox plugin new mine\nnixbox mine hello\n```",
        "```text\nnixbox upp\n```",
        "`nixbox PLUGIN COMMAND`, `nixbox up [NAME]`, `nixbox --debug …`, `nixbox run -- x --y`, `nixbox aws …`",
    ],
)
def test_a_right_command_is_none(text: str) -> None:
    assert faults(text) == []


# --- files and tests that pages show ---------------------------------------------------------------------


def toml_fault(block: Block, plugins: set[str]) -> str | None:
    """What is wrong with a block of TOML: that it is for no file, or that nixbox would refuse it there."""
    title = re.search(r'title="([^"]+)"', block.info)
    model = next((model for name, model in MODELS.items() if title and re.fullmatch(name, title[1])), None)
    if model is None:
        return f'for which file is `{block.info}`? e.g. toml title=".nixbox/config.toml"'
    data = tomllib.loads(block.text)
    found, wrong = schema.validate(model, data, data.get("base", "debian"))
    words = [str(one) for one in wrong]
    if isinstance(found, schema.Config):
        words += [f"no plugin {ref}" for ref in found.plugins if re.fullmatch("[a-z-]+", ref) and ref not in plugins]
    return "; ".join(words) or None


def toml_faults(text: str) -> list[str]:
    """All that is wrong with the files that a page shows."""
    plugins = {*PLUGINS, *re.findall(r"nixbox plugin new ([a-z-]+)", text)}
    shown = [block for block in split(text)[0] if block.info.partition(" ")[0] == "toml"]
    return [wrong for block in shown if (wrong := toml_fault(block, plugins))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_shown_would_be_taken(page: Path) -> None:
    assert toml_faults(page.read_text()) == []


def test_files_are_shown() -> None:
    infos = [block.info for page in PAGES for block in split(page.read_text())[0]]
    for name in ("config.toml", "plugin.toml", "profiles/dev.toml"):
        assert [info for info in infos if info.startswith("toml ") and name in info], name


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ('```toml title=".nixbox/config.toml"\nnmae = "x"\n```', "did you mean `name`"),
        ('```toml title=".nixbox/config.toml"\nplugins = ["gti"]\n```', "no plugin gti"),
        ('```toml title="profiles/dev.toml"\nports = []\n```', "unknown field"),
        ('```toml title="plugin.toml"\nenv = {}\n```', "a plugin cannot set variables"),
        ("```toml\nname = 1\n```", "for which file"),
    ],
)
def test_a_wrong_file_is_found(block: str, words: str) -> None:
    (found,) = toml_faults(block)
    assert words in found


def named_tests(text: str) -> list[str]:
    return re.findall(r"tests/[a-z_/]+\.py::[A-Za-z0-9_]+", text)


def is_test(name: str) -> bool:
    file, _, function = name.partition("::")
    path = ROOT / file
    return path.is_file() and re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE) is not None


def test_every_promise_about_security_names_tests_that_are_there() -> None:
    text = (DOCS / "security.md").read_text()
    rows = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| what |", "| ---"))
    ]
    assert rows and [row for row in rows if not named_tests(row)] == []
    assert [name for name in named_tests(text) if not is_test(name)] == []
    assert not is_test("tests/vm/test_network.py::test_nothing_of_the_kind")
    assert not is_test("tests/vm/test_nothing.py::test_it")


# --- pages that are made ---------------------------------------------------------------------------------


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, one in getattr(command, "commands", {}).items():
        yield f"{path} {name}", one
        yield from walk(one, f"{path} {name}")


def plain(text: str) -> str:
    """A page's text without what keeps the cells of its tables whole."""
    return html.unescape(re.sub("</?code>", "`", text).replace("\\|", "|"))


def cli_faults(text: str) -> list[str]:
    sections = dict(re.findall(r"^#+ (nixbox [^\n]*)\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL))
    found = []
    for path, command in walk(ROOT_COMMAND, "nixbox"):
        section = plain(sections.get(path, ""))
        if not section:
            found.append(path)
            continue
        wanted = [name for one in command.params for name in (*one.opts, *one.secondary_opts) if name.startswith("-")]
        wanted += [one.help for one in command.params if one.help]
        found += [f"{path}: {one}" for one in [command.help, *wanted] if one not in section]
    return found


def test_the_reference_of_commands_is_whole() -> None:
    text = cli_reference()
    assert cli_faults(text) == []
    assert {path.split()[1] for path, _ in walk(ROOT_COMMAND, "nixbox")} == RESERVED
    for code in ExitCode:
        assert re.search(rf"^\| {int(code)} \| \S", text, re.MULTILINE), code
    assert cli_faults(text.replace("### nixbox net allow\n", "### nixbox\n")) == ["nixbox net allow"]
    assert cli_faults(text.replace("`--cold`", "")) == ["nixbox up: --cold"]


def fields_of(model: Any) -> Iterator[tuple[str, str | None]]:
    """The fields of a model and of all models inside it, with their descriptions."""
    found = model.model_json_schema(by_alias=True)
    inner = found.get("$defs", {})
    for one in (found, *inner.values()):
        for name, field in one.get("properties", {}).items():
            # A description that is the inner model's own is not said twice.
            same = inner.get(field.get("$ref", "").rpartition("/")[2], {})
            yield name, field.get("description") or same.get("description")


def config_faults(model: Any, text: str) -> list[str]:
    found = []
    for name, words in fields_of(model):
        if not words:
            found.append(f"{name}: no description")
        elif f"| `{name}` | {words}" not in plain(text):
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (schema.Config, reference.config_reference()),
        (schema.Profile, reference.profile_reference()),
        (schema.Plugin, reference.plugin_reference()),
        (schema.UserSettings, reference.settings_reference()),
    ],
    ids=["config", "profile", "plugin", "settings"],
)
def test_the_reference_of_a_file_is_whole(model: Any, text: str) -> None:
    assert config_faults(model, text) == []
    for name, words in fields_of(model):  # each of them would be missed
        assert name in config_faults(model, text.replace(f"| `{name}` | {words}", ""))


def test_a_cell_holds_whatever_is_said() -> None:
    markdown = importlib.import_module("markdown")
    for text, shown in (
        ("`a|b` or c|d", "<code>a|b</code> or c|d"),
        ("<b> `<c>`", "&lt;b&gt; <code>&lt;c&gt;</code>"),
        ("two\nlines, `x`", "two lines, <code>x</code>"),
    ):
        page = markdown.markdown(f"| a | b |\n| --- | --- |\n| {reference.cell(text)} | z |\n", extensions=["tables"])
        cells = re.findall("<td>(.*?)</td>", page.replace("&#124;", "|").replace("&amp;", "&"))
        assert cells == [shown, "z"], page


def test_a_field_without_words_is_missed() -> None:
    class Silent(schema.Config):
        more: int = 1

    assert config_faults(Silent, reference.config_reference()) == ["more: no description"]


def test_defaults_are_as_they_are_written() -> None:
    text = reference.config_reference()
    assert '| `"2GiB"` |' in text and '| `"10GiB"` |' in text
    assert '| `[{ source = ".", target = "~/workspace", readonly = false }]` |' in text
    assert 'It is `"off"`, `"filtered"` or `"open"`.' in text
    for row in re.findall(r"^\| `(\w+)` \|.*\| `(.*)` \|$", text, re.MULTILINE):
        assert tomllib.loads(f"{row[0]} = {row[1]}"), row
    assert "## [[hooks.pre-up]]" in text and "## [env.NAME]" in text


# --- the site --------------------------------------------------------------------------------------------


def build(place: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `make docs` does, but elsewhere."""
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / "mkdocs.yml"), "-d", str(place)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    done = build(place)
    assert done.returncode == 0, done.stderr
    return place


def test_every_decision_is_in_the_index_and_the_site(built: Path) -> None:
    index = site.pages(ROOT, DOCS)["decisions/index.md"]
    page = (built / "decisions/index.html").read_text()
    found = sorted((DOCS / "decisions").glob("*.md"))
    assert len(found) > 25
    for path in found:
        number = path.name.partition("-")[0]
        assert re.search(
            rf"^\| {number} \| \[\S[^\]]*\]\({re.escape(path.name)}\) \| \S.* \|$", index, re.MULTILINE
        ), path
        assert f'href="{path.stem}.html"' in page
        assert (built / f"decisions/{path.stem}.html").is_file()


def test_every_plugin_is_in_the_site(built: Path) -> None:
    page = (built / "plugins/index.html").read_text()
    for name, path in PLUGINS.items():
        assert f'href="{name}.html"' in page
        for command in plugin_commands(path.read_text()):
            assert f"nixbox {name} {command}" in page


def test_the_site_needs_no_network(built: Path) -> None:
    loaded = re.compile(
        r'<(?:script|link|img|iframe)[^>]*(?:src|href)="?((?:https?:)?//[^" >]*)|url\(["\']?(https?:[^)]*)'
    )
    pages = [*built.rglob("*.html"), *built.rglob("*.css")]
    assert len(pages) > 40
    assert [(page.name, found) for page in pages for found in loaded.findall(page.read_text())] == []
    assert loaded.findall('<script src="https://a.example/x.js"></script>')
    for page in built.rglob("*.html"):
        if page.name != "404.html":
            (script,) = re.findall(r'<script src="([^"]*iframe-worker\.js)"', page.read_text())
            assert (page.parent / script).is_file()


def test_the_readme_is_a_page(built: Path) -> None:
    page = (built / "readme.html").read_text()
    assert 'href="security.html"' in page and 'href="decisions/index.html"' in page
    assert "new machine to first command" in page  # what was measured is there too


def test_nothing_is_written_beside_the_sources(built: Path) -> None:
    assert not [path for path in DOCS.rglob("*") if path.name in ("__pycache__", "reference", "readme.md")]
    assert not (DOCS / "decisions/index.md").exists()
    assert not [*built.rglob("*.py"), *built.rglob("__pycache__")]


@pytest.mark.parametrize(
    ("page", "text", "words"),
    [
        ("index.md", "[x](nowhere.md)", "nowhere.md"),
        ("index.md", "[x](install.md#nowhere)", "#nowhere"),
        ("security.md", "[x](decisions/999-none.md)", "999-none.md"),
        ("guides/plugins.md", "[x](../reference/plugin.md#nofield)", "#nofield"),
        ("more.md", "# More\n", "more.md"),
    ],
    ids=["page", "anchor", "decision", "made", "not in nav"],
)
def test_a_fault_ends_the_build(tmp_path: Path, page: str, text: str, words: str) -> None:
    copy(tmp_path)
    with (tmp_path / "docs" / page).open("a") as file:
        file.write(f"\n{text}\n")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode != 0 and words in done.stderr, done.stderr


def test_a_wrong_link_of_the_readme_ends_the_build(tmp_path: Path) -> None:
    copy(tmp_path)
    with (tmp_path / "README.md").open("a") as file:
        file.write("\n[x](docs/nowhere.md)\n")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode != 0 and "nowhere.md" in done.stderr, done.stderr


def copy(place: Path) -> None:
    """The documentation's sources, to be changed."""
    for path in (ROOT / "mkdocs.yml", ROOT / "README.md", *DOCS.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            there = place / path.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(path.read_bytes())


def test_sources_are_where_they_are_looked_for() -> None:
    assert (paths.docs_dir() / "mkdocs.yml").samefile(ROOT / "mkdocs.yml")
