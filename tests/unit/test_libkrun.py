"""Where libkrun is looked for, and its declarations: made once, whole, and true of the library that is installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nixbox.errors import HostError
from nixbox.machine import libkrun
from nixbox.machine.krun_child import Library, Refused
from tests.krun import HANG_S, c_library, module, needs_cc, needs_library

DECLARED = re.findall(r"\b(krun_\w+)\(", libkrun.DECLARATIONS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no library but those that it names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(libkrun.VARIABLE, raising=False)
    monkeypatch.setattr(libkrun, "_LIBRARIES", (str(tmp_path / "lib64"), str(tmp_path / "lib")))
    monkeypatch.setattr(libkrun, "_MAC_LIBRARIES", (str(tmp_path / "homebrew"), str(tmp_path / "lib")))
    return tmp_path / "cache" / "nixbox"


def file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def package(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Make a package of our own the one that is installed."""
    file(place / "ownkrun" / "__init__.py")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(libkrun, "PACKAGE", "ownkrun")


# --- find ---


def test_what_is_named_comes_before_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(monkeypatch, tmp_path / "site")
    packaged = file(tmp_path / "site/ownkrun/libkrun.so")
    assert libkrun.find() == packaged
    file(tmp_path / "lib/libkrun.so")
    newer = file(tmp_path / "lib/libkrun.so.2")
    assert libkrun.find() == newer
    first = file(tmp_path / "lib64/libkrun.so.1")
    assert libkrun.find() == first
    in_variable, in_settings = file(tmp_path / "variable.so"), file(tmp_path / "settings.so")
    monkeypatch.setenv(libkrun.VARIABLE, str(in_variable))
    assert libkrun.find() == libkrun.find("") == in_variable
    assert libkrun.find(str(in_settings)) == in_settings


def test_a_name_may_be_a_link_or_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    real = file(tmp_path / "real.so")
    (tmp_path / "link.so").symlink_to(real)
    assert libkrun.find("~/link.so") == real


def test_a_named_file_that_is_missing_is_told_with_who_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file(tmp_path / "lib/libkrun.so")  # nothing else is taken in its place
    gone = str(tmp_path / "gone.so")
    with pytest.raises(HostError) as caught:
        libkrun.find(gone)
    assert str(caught.value) == f"[krun] library in settings.toml names {gone}, and there is no such file"
    monkeypatch.setenv(libkrun.VARIABLE, str(tmp_path))  # a directory is no library either
    with pytest.raises(HostError, match=f"^{libkrun.VARIABLE} names {tmp_path}, ") as caught:
        libkrun.find()
    assert "--backend qemu" in str(caught.value.hint)


def test_where_there_is_none_the_mends_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libkrun, "PACKAGE", "no_such_package")
    with pytest.raises(HostError, match="there is no libkrun on this host") as caught:
        libkrun.find()
    for mend in ("pip install 'nixbox[krun]'", "[krun] library", libkrun.VARIABLE, "--backend qemu"):
        assert mend in str(caught.value.hint)
    package(monkeypatch, tmp_path / "site")  # installed for another system: without the file
    with pytest.raises(HostError, match="there is no libkrun"):
        libkrun.find()


def test_macos_has_its_own_names_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(monkeypatch, tmp_path / "site")
    file(tmp_path / "lib64/libkrun.so.2")
    file(tmp_path / "site/ownkrun/libkrun.so")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(HostError):
        libkrun.find()
    packaged = file(tmp_path / "site/ownkrun/libkrun.dylib")
    assert libkrun.find() == packaged
    brewed = file(tmp_path / "homebrew/libkrun.1.dylib")
    assert libkrun.find() == brewed


# --- the declarations ---


def test_what_is_needed_is_declared() -> None:
    assert set(libkrun.NEEDED) <= set(DECLARED)
    assert len(DECLARED) == len(set(DECLARED)) == libkrun.DECLARATIONS.count(";")


def test_the_module_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = libkrun.compiled()
    assert directory.parent == cache
    assert [path.name for path in directory.iterdir()] == [f"{libkrun.MODULE}.py"]
    assert directory.stat().st_mode & 0o077 == 0
    before = next(directory.iterdir()).stat()
    monkeypatch.setitem(sys.modules, "cffi", None)  # an import of it fails from here on
    assert libkrun.compiled() == directory
    assert next(directory.iterdir()).stat() == before
    monkeypatch.setattr(libkrun, "DECLARATIONS", libkrun.DECLARATIONS + "int32_t krun_novel(void);\n")
    with pytest.raises(ImportError):
        libkrun.compiled()  # other declarations are another module


def test_a_module_that_could_not_be_made_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cffi import recompiler

    def full(_builder: object, _name: str, target: str) -> None:
        Path(target).write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(recompiler, "make_py_source", full)
        with pytest.raises(OSError, match="No space"):
            libkrun.compiled()
    assert [path for path in cache.rglob("*") if not path.is_dir()] == []
    assert module().ffi.typeof("uint32_t")


def test_threads_that_make_it_at_once_leave_a_whole_one() -> None:
    begin = threading.Barrier(8)
    failures: list[BaseException] = []

    def make() -> None:
        begin.wait(HANG_S)
        try:
            assert module().ffi.typeof("uint32_t")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert failures == []
    left = {path.name for path in libkrun.compiled().iterdir()} - {"__pycache__"}  # of the imports
    assert left == {f"{libkrun.MODULE}.py"}


def test_processes_that_make_it_at_once_leave_a_whole_one() -> None:
    script = "from nixbox.machine import libkrun; print((libkrun.compiled() / 'nixbox_krun.py').read_text())"
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(4)]
    texts = [process.communicate(timeout=HANG_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    whole = (libkrun.compiled() / f"{libkrun.MODULE}.py").read_bytes()
    assert {text.strip() for text in texts} == {whole.strip()}


def test_the_module_needs_nothing_but_cffis_own_compiled_one() -> None:
    script = (
        "import sys, json; sys.path[:0] = sys.argv[1:]; import nixbox_krun\n"
        "nixbox_krun.ffi.new('char *[]', [nixbox_krun.ffi.NULL])\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    places = [str(libkrun.compiled()), libkrun.cffi_directory()]
    argv = [sys.executable, "-I", "-S", "-c", script, *places]
    said = subprocess.run(argv, capture_output=True, check=True, timeout=HANG_S)
    modules = json.loads(said.stdout)
    assert "_cffi_backend" in modules
    assert not {"cffi", "pycparser", "subprocess"} & set(modules)


# --- libraries ---


@needs_library
def test_the_declarations_are_those_of_the_installed_library() -> None:
    library = Library(str(libkrun.find()), module().ffi, list(libkrun.NEEDED))
    assert [name for name in DECLARED if not library.has(name)] == [
        "krun_disable_implicit_vsock",  # of version 1, for what version 2 no longer does of itself
        "krun_disable_implicit_console",
    ]
    assert not library.has("krun_no_such_function")


@needs_library
def test_a_call_that_fails_is_refused_with_its_number() -> None:
    library = Library(str(libkrun.find()), module().ffi, list(libkrun.NEEDED))
    context = library.call("krun_create_ctx")
    assert library.call("krun_set_vm_config", context, 1, 128) == 0
    for name, arguments, code in (
        ("krun_set_vm_config", (context + 1000, 1, 128), 2),
        ("krun_set_vm_config", (context, 0, 128), 22),
        ("krun_start_enter", (context + 1000,), 2),
    ):
        with pytest.raises(Refused) as caught:
            library.call(name, *arguments)
        assert (caught.value.what, caught.value.code) == (name, code)


@needs_cc
def test_the_librarys_own_words_are_passed_on(tmp_path: Path) -> None:
    source = tmp_path / "words.c"
    source.write_text(
        'char *krun_get_last_error(void) { return "no \\xff\\n"; }\nint krun_create_ctx() { return -5; }'
    )
    made = tmp_path / "words.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(made), str(source)], check=True, timeout=HANG_S)
    library = Library(str(made), module().ffi, ["krun_create_ctx"])
    with pytest.raises(Refused) as caught:
        library.call("krun_create_ctx")
    assert (caught.value.code, caught.value.detail) == (5, "no \ufffd\n")


def test_a_library_without_the_functions_is_refused_with_their_names() -> None:
    with pytest.raises(Refused) as caught:
        Library(c_library(), module().ffi, ["getpid", *libkrun.NEEDED])
    assert caught.value.what == "symbol"
    assert caught.value.detail.split(", ")[1:] == list(libkrun.NEEDED)


@needs_library
def test_a_file_that_is_no_library_for_this_machine_is_refused(tmp_path: Path) -> None:
    head = bytearray(libkrun.find().read_bytes()[: 1 << 16])
    head[18:20] = (183).to_bytes(2, "little")  # e_machine: EM_AARCH64
    for name, data in (
        ("aarch64", bytes(head)),
        ("text", b"INPUT(-lkrun)\n" * 100),
        ("empty", b""),
        ("cut", bytes(head[:40])),
    ):
        path = tmp_path / f"{name}.so"
        path.write_bytes(data)
        with pytest.raises(Refused) as caught:
            Library(str(path), module().ffi, list(libkrun.NEEDED))
        assert caught.value.what == "dlopen"
        assert str(path) in caught.value.detail
