"""What mkdocs calls while it builds the documentation: the pages that are made from the code and from other files.

`docs/pages.py` names these functions to mkdocs (mkdocs.yml, `hooks`). Nothing is written beside the sources.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nixbox import paths
from nixbox.cli.reference import cli_reference
from nixbox.config import reference

_DECISIONS = "decisions"
_PLUGINS = "plugins"
_DECISION = ["", "decision", "status"]  # the columns of its index
_PLUGIN = ["plugin", "what it brings", "commands"]

# Page -> (its title, what follows).
_REFERENCES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "reference/cli.md": ("Commands", cli_reference),
    "reference/config.md": ("config.toml", reference.config_reference),
    "reference/profile.md": ("Profiles", reference.profile_reference),
    "reference/plugin.md": ("plugin.toml", reference.plugin_reference),
    "reference/settings.md": ("settings.toml", reference.settings_reference),
}


def on_config(config: Any) -> Any:
    """Name every decision and every plugin in the navigation, below its index."""
    sections = {
        _DECISIONS: [f"{_DECISIONS}/{path.name}" for path in _decisions(Path(config.docs_dir))],
        _PLUGINS: [f"{_PLUGINS}/{path.name}.md" for path in _plugins()],
    }
    for entry in config.nav:
        for title, page in entry.items() if isinstance(entry, dict) else ():
            for section, pages in sections.items():
                if page == f"{section}/index.md":
                    entry[title] = [page, *pages]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file holds."""
    from mkdocs.structure.files import File

    for page, text in pages(Path(config.config_file_path).parent, Path(config.docs_dir)).items():
        files.append(File.generated(config, page, content=text))
    return files


def pages(root: Path, docs: Path) -> dict[str, str]:
    """The pages that are made, Markdown by path: `root` holds README.md, `docs` the pages that are written."""
    made = {page: f"# {title}\n\n{text()}" for page, (title, text) in _REFERENCES.items()}
    made["readme.md"] = _from_top_level((root / "README.md").read_text(encoding="utf-8"))
    made[f"{_DECISIONS}/index.md"] = _decisions_index(docs)
    made[f"{_PLUGINS}/index.md"] = _plugins_index()
    for path in _plugins():
        made[f"{_PLUGINS}/{path.name}.md"] = (path / "README.md").read_text(encoding="utf-8")
    return made


def _from_top_level(text: str) -> str:
    """README.md as a page beside the others: its links into docs/ begin there."""
    text = re.sub(r"\]\(docs/decisions/?\)", "](decisions/index.md)", text)
    return re.sub(r"\]\((?:\./)?docs/", "](", text)


def _decisions(docs: Path) -> list[Path]:
    return sorted((docs / _DECISIONS).glob("[0-9]*.md"))


def _decisions_index(docs: Path) -> str:
    """A table of the decisions with their standing."""
    rows = []
    for path in _decisions(docs):
        text = path.read_text(encoding="utf-8")
        number, _, words = text.partition("\n")[0].lstrip("# ").strip().partition(" ")
        # Both ways to write it: `**Status**: accepted.`, and a heading.
        found = re.search(r"^(?:\*\*Status\*\*: |## Status\n+)(.*)$", text, re.MULTILINE)
        rows.append([number.rstrip(":"), f"[{words}]({path.name})", found[1] if found else ""])
    return _page("Decisions", "Why things are as they are, in the order in which they were decided.", _DECISION, rows)


def _plugins() -> list[Path]:
    """The plugins that nixbox brings."""
    return sorted(file.parent for file in paths.plugins_dir().glob("*/README.md"))


def _plugins_index() -> str:
    """A table of nixbox's own plugins with their commands."""
    rows = []
    for path in _plugins():
        said = tomllib.loads((path / "plugin.toml").read_text(encoding="utf-8"))
        commands = ", ".join(f"`nixbox {path.name} {one['name']}`" for one in said.get("commands", []))
        rows.append([f"[{path.name}]({path.name}.md)", said.get("description", ""), commands])
    words = (
        "What nixbox brings. `nixbox plugin show NAME` says all that one adds to a workspace; "
        "[to write one](../guides/plugins.md) takes a directory and a file."
    )
    return _page("Plugins", words, _PLUGIN, rows)


def _page(title: str, words: str, columns: list[str], rows: list[list[str]]) -> str:
    """A page with one table."""
    table = [columns, ["---"] * len(columns), *([reference.cell(text) for text in row] for row in rows)]
    return f"# {title}\n\n{words}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in table)
