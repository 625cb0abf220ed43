"""Whether an image is what its lock says: everything of it is built once more, and compared bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nixbox import paths, run
from nixbox.errors import ConfigError, ExitCode, NixboxError
from nixbox.image import build, listing, store
from nixbox.image.listing import Difference
from nixbox.plan.model import ImageSpec
from nixbox.report import Reporter
from nixbox.values import dataclass

_DIFFERS = 104  # nix-store(1), "special exit codes": another output in check mode
_SUFFIX = ".check"  # where Nix keeps the second output with --keep-failed
_SHOWN = 40


class DiffersError(NixboxError):
    """An image was built again and came out otherwise."""

    exit_code = ExitCode.DIFFERS


@dataclass(frozen=True, slots=True)
class Step:
    """One derivation of an image that is built here (not fetched by its hash), and its output."""

    drv: Path
    output: Path

    @property
    def name(self) -> str:
        """What it is called, without hash."""
        return build.title(str(self.output))


@dataclass(frozen=True, slots=True)
class Checked:
    """What building a step again came to."""

    step: Step
    differences: tuple[Difference, ...]

    @property
    def agrees(self) -> bool:
        """Whether both builds are the same, bit for bit."""
        return not self.differences

    def as_json(self) -> dict[str, object]:
        """For `nixbox build --check --json`."""
        rows = [{"path": d.path, "what": d.what, "built": d.built, "again": d.again} for d in self.differences]
        step = self.step
        return {
            "name": step.name,
            "drv": str(step.drv),
            "output": str(step.output),
            "agrees": self.agrees,
            "differences": rows,
        }


def outputs(drv_text: str) -> list[tuple[str, str]]:
    """The outputs of a derivation (its ATerm): store path, and the kind of its hash, which only a fixed one has."""
    head = re.match(r'Derive\(\[((?:\("[^"]*","[^"]*","[^"]*","[^"]*"\),?)+)\],', drv_text)
    if head is None:
        raise NixboxError(f"not a derivation: {drv_text[:60]!r}…")
    return [(row[1], row[2]) for row in re.findall(r'\("([^"]*)","([^"]*)","([^"]*)","([^"]*)"\)', head[1])]


def steps(drv: Path) -> list[Step]:
    """What an image is built of, what each needs before it; fetched files are what their hashes say."""
    found = []
    for path in store.requisites(drv):  # sorted so already (nix-store(1))
        if path.suffix == ".drv":
            rows = outputs(store.physical(path).read_text(errors="replace"))
            found += [Step(path, Path(output)) for output, kind in rows if not kind]
    return found


def require_reproducible(spec: ImageSpec) -> None:
    """Raise ConfigError for an image whose build reaches the network: it may be another one each time."""
    if spec.build and spec.build_network:
        names = ", ".join(script.origin for script in spec.build)
        raise ConfigError(
            f"this image is not reproducible: its build ({names}) may use the network (build_network)",
            hint="without build_network (what it fetches may come as packages) --check can tell",
        )


def check(spec: ImageSpec, image_key: str, expression: str, reporter: Reporter) -> list[Checked]:
    """Build every step of an image again, on this host, and compare. The image must be there, and its sources.

    A step that is not in the store any more (an image that was imported, or collected garbage) is first built.
    Nothing of the second build stays. Raises BuildError, ConfigError, NixboxError.
    """
    require_reproducible(spec)
    file = build.roots_dir() / f"{image_key}.nix"
    paths.write_atomic(file, expression)
    return check_drv(build.instantiate(file), reporter)


def check_drv(drv: Path, reporter: Reporter) -> list[Checked]:
    """`check` of a derivation: all that it is built of, and itself."""
    every = steps(drv)
    missing = store.invalid(step.output for step in every)
    tools = None  # with which images are made, and so unpacked
    found = []
    for step in every:
        if step.output in missing:
            _realise(step, (), reporter, lambda: None)
        if store.is_there(step.output / "usr/bin/unsquashfs"):
            tools = step.output
        found.append(_again(step, tools, reporter))
    return found


def _realise(step: Step, options: Sequence[str], reporter: Reporter, differs: Callable[[], None]) -> None:
    setup = store.setup()
    argv = ["nix-store", "--realise", *options, "--log-format", "internal-json", str(step.drv), *setup.options]
    log = build.Log(reporter)
    with build.scratch() as directory:
        done = run.stream(argv, on_err=log.line, env=store.env() | {"TMPDIR": directory})
        said = "\n".join(log.errors)
        if done.code == _DIFFERS or "may not be deterministic" in said:
            differs()
        elif done.code != 0:
            raise log.failure(done.code)


def _again(step: Step, tools: Path | None, reporter: Reporter) -> Checked:
    """Build a step once more and compare."""
    second = step.output.with_name(step.output.name + _SUFFIX)
    found: list[Difference] = []

    def compare() -> None:
        reporter.phase(f"comparing the two builds of {step.name}")
        one, other = store.physical(step.output), store.physical(second)
        tree = store.physical(tools) if tools else None
        found.extend(listing.differences(one, other, step.name, tree))
        if not found:  # Nix has seen a difference that a listing does not show: never is it taken for none
            found.append(Difference(step.name, "bits", "one build", "another one"))

    try:
        _realise(step, ("--check", "--keep-failed"), reporter, compare)
    finally:
        if store.is_there(second):
            store.delete([second])
    return Checked(step, tuple(found))


def report(found: Sequence[Checked]) -> DiffersError | None:
    """What is said of an image that came out otherwise; None when it did not."""
    differing = [one for one in found if not one.agrees]
    if not differing:
        return None
    lines = []
    for one in differing:
        count = len(one.differences)
        lines.append(f"{one.step.name}: {count} difference{'s' if count > 1 else ''} (built before / built now)")
        lines += [f"  {difference.line()}" for difference in one.differences[:_SHOWN]]
        if count > _SHOWN:
            lines.append(f"  … and {count - _SHOWN} more (--json has all)")
    body = "\n".join(lines)
    return DiffersError(
        f"{len(differing)} of {len(found)} builds of this image came out otherwise:\n{body}",
        hint="a build script that writes a time, a random number or an order of files does that",
    )
