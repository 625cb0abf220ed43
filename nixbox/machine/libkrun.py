"""libkrun, the library: where it is, what of it is used, and that in the form in which cffi loads it at once.

The declarations are those of libkrun's own include/libkrun.h (versions 1.15 to 2.0), and for the last three those of
smolmachines 1.32, whose launcher uses them so (src/agent/launcher.rs there). Builds differ in what they have: each
function is looked up when it is needed, and one that is missing is named.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from nixbox import paths
from nixbox.digests import sha256
from nixbox.errors import HostError

VARIABLE = "NIXBOX_LIBKRUN"
PACKAGE = "smol"  # what the PyPI package smolmachines installs
MODULE = "nixbox_krun"
DECLARATIONS = """
int32_t krun_init_log(int target_fd, uint32_t level, uint32_t style, uint32_t options);
int32_t krun_create_ctx(void);
int32_t krun_get_max_vcpus(void);
char *krun_get_last_error(void);
int32_t krun_disable_implicit_vsock(uint32_t ctx_id);
int32_t krun_disable_implicit_console(uint32_t ctx_id);
int32_t krun_disable_implicit_init(uint32_t ctx_id);
int32_t krun_set_vm_config(uint32_t ctx_id, uint8_t num_vcpus, uint32_t ram_mib);
int32_t krun_set_kernel(uint32_t ctx_id, const char *kernel_path, uint32_t kernel_format, const char *initramfs,
                        const char *cmdline);
int32_t krun_set_exec(uint32_t ctx_id, const char *exec_path, const char *const argv[], const char *const envp[]);
int32_t krun_add_disk2(uint32_t ctx_id, const char *block_id, const char *disk_path, uint32_t disk_format,
                       bool read_only);
int32_t krun_add_virtiofs3(uint32_t ctx_id, const char *c_tag, const char *c_path, uint64_t shm_size, bool read_only);
int32_t krun_add_net_tap(uint32_t ctx_id, char *c_tap_name, uint8_t *const c_mac, uint32_t features, uint32_t flags);
int32_t krun_add_virtio_console_multiport(uint32_t ctx_id);
int32_t krun_add_console_port_tty(uint32_t ctx_id, uint32_t console_id, const char *name, int tty_fd);
int32_t krun_add_console_port_inout(uint32_t ctx_id, uint32_t console_id, const char *name, int input_fd,
                                    int output_fd);
int32_t krun_start_enter(uint32_t ctx_id);

int32_t krun_set_control_socket(uint32_t ctx_id, const char *path);
int32_t krun_set_snapshot(uint32_t ctx_id, const char *directory);
int32_t krun_set_snapshot_memory_fd2(uint32_t ctx_id, int fd, uint32_t immutable);
"""
# What cannot be done without, of a build that is not too old or too small.
NEEDED = (
    *("krun_init_log", "krun_create_ctx", "krun_set_vm_config", "krun_set_kernel", "krun_disable_implicit_init"),
    *("krun_add_disk2", "krun_add_virtiofs3", "krun_add_net_tap", "krun_add_virtio_console_multiport"),
    *("krun_add_console_port_tty", "krun_add_console_port_inout", "krun_start_enter"),
)
# With these a guest is saved and goes on in another process.
SNAPSHOTS = ("krun_set_control_socket", "krun_set_snapshot", "krun_set_snapshot_memory_fd2")
_LIBRARIES = ("/usr/local/lib64", "/usr/local/lib", "/usr/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib")
_MAC_LIBRARIES = ("/opt/homebrew/lib", "/usr/local/lib")
_HINT = (
    "pip install 'nixbox[krun]', or install libkrun and name it: [krun] library in the user's settings.toml, or "
    f"{VARIABLE}; `--backend qemu` does without"
)


def names() -> tuple[str, ...]:
    """The library's file names on this system, the newest first."""
    if sys.platform == "darwin":  # not run on the machines that this was written on
        return ("libkrun.2.dylib", "libkrun.1.dylib", "libkrun.dylib")
    return ("libkrun.so.2", "libkrun.so.1", "libkrun.so")


def find(configured: str | None = None) -> Path:
    """The library: `configured`, else NIXBOX_LIBKRUN, else the loader's, else that of the package smolmachines.

    Raises HostError when there is none, or when one that was named is not there.
    """
    for value, origin in ((configured, "[krun] library in settings.toml"), (os.environ.get(VARIABLE), VARIABLE)):
        if value:
            path = Path(value).expanduser()
            if not path.is_file():
                raise HostError(f"{origin} names {value}, and there is no such file", hint=_HINT)
            return path.resolve()
    for path in (*_loaders(), *_packaged()):
        if path.is_file():
            return path.resolve()
    raise HostError("there is no libkrun on this host, which the backend krun needs", hint=_HINT)


def _loaders() -> Iterator[Path]:
    if sys.platform == "darwin":
        for directory in _MAC_LIBRARIES:
            yield from (Path(directory, name) for name in names())
    else:  # looked for and not asked for: ctypes.util.find_library starts compilers to find nothing, 40 ms each time
        for directory in _LIBRARIES:
            yield from (Path(directory, name) for name in names())


def _packaged() -> Iterator[Path]:
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        return
    for directory in spec.submodule_search_locations or () if spec is not None else ():
        yield Path(directory, "libkrun.dylib" if sys.platform == "darwin" else "libkrun.so")


def has_snapshots(library: Path) -> bool:
    """Whether a library has SNAPSHOTS: looked up in its file, as loading it would take longer. Raises OSError."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return all(data.find(b"\0" + name.encode() + b"\0") >= 0 for name in SNAPSHOTS)


def compiled() -> Path:
    """A directory with the module MODULE: the declarations as cffi's out-of-line ABI mode has them.

    To read them as C takes 35 ms, and the module 1 ms, so it is made once for each build of cffi. Raises OSError
    when the cache cannot be written.
    """
    info = _cffi().stat()
    ident = sha256(f"{info.st_size} {info.st_mtime_ns}\n{DECLARATIONS}".encode()).hexdigest()[:16]
    directory = paths.cache_dir() / f"krun-{ident}"
    module = directory / f"{MODULE}.py"
    if not module.is_file():
        import cffi
        from cffi import recompiler

        builder = cffi.FFI()
        builder.cdef(DECLARATIONS)
        builder.set_source(MODULE, None)
        paths.cache_dir().mkdir(parents=True, exist_ok=True)
        paths.private_dir(directory)
        import tempfile

        with tempfile.TemporaryDirectory(dir=directory) as place:  # whoever else makes it now has another
            made = Path(place, module.name)
            recompiler.make_py_source(builder, MODULE, str(made))
            made.replace(module)
    return directory


def cffi_directory() -> str:
    """Where cffi's own compiled module lies, for a Python that was started without its site's packages."""
    return str(_cffi().parent)


def _cffi() -> Path:
    """The file of cffi's compiled module, which takes longer to load than to find."""
    spec = importlib.util.find_spec("_cffi_backend")
    assert spec is not None and spec.origin is not None  # a dependency of ours
    return Path(spec.origin)
