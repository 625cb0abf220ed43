"""`nixbox update` of Debian's packages, from the mirror, beside a machine that runs on the image of before."""

from __future__ import annotations

import json

from tests.vm.conftest import Workspace


def test_update_brings_debians_packages_of_today(workspace: Workspace) -> None:
    workspace("up")
    file = workspace.path / ".nixbox" / "nixbox.lock"
    workspace("update", "debian")  # the mirror may have moved since the session's lock was made
    today = file.read_text()
    assert workspace("update").stderr.endswith("nothing to update\n")
    assert file.read_text() == today

    data = json.loads(today)
    (less,) = [package for package in data["base_packages"] if package["name"] == "less"]
    current, less["version"] = less["version"], "1-0"
    gone = data["base_packages"].pop([p["name"] for p in data["base_packages"]].index("curl"))
    file.write_text(json.dumps(data))
    before = file.read_text()
    shown = f"debian trixie: 2 packages\n  + curl {gone['version']}\n  ~ less 1-0 → {current}\n"
    dry = workspace("update", "--dry-run")
    assert dry.stdout == shown
    assert "running" not in dry.stderr
    assert file.read_text() == before
    (row,) = json.loads(workspace("update", "debian", "--dry-run", "--json").stdout)
    assert (row["ref"], row["packages"]["changed"]) == ("debian", {"less": ["1-0", current]})

    done = workspace("update", "debian")
    assert done.stdout == shown
    assert "note: `box` is running on the old image: nixbox down box; nixbox up box" in done.stderr
    assert file.read_text() == today
    refused = workspace("update", "nixpkgs", code=2).stderr
    words = "there is no nixpkgs to update: the image is made of debian\nhint: `nixbox update debian`"
    assert words in refused
