# What the flake makes with nixpkgs: the application, the shell to work on it, the checks, the formatter.
#
# Never evaluated with nixpkgs itself so far (it could not be fetched where this was written), only with a
# stand-in that has exactly the attributes used here (tests/nix/test_flake.py). Keep them few.
{ pkgs, src, version }:
let
  python = pkgs.python3Packages;
  inherit (pkgs.stdenv.hostPlatform) isLinux;
  dependencies = py: [ py.cffi py.nix-prefetch-github py.pydantic py.sh py.tomlkit py.typer ];
  onLinux = pkgs.lib.optionals isLinux;
  programs = [ pkgs.e2fsprogs pkgs.openssh pkgs.qemu ] ++ onLinux [ pkgs.passt pkgs.util-linux pkgs.virtiofsd ];
  # The user's own come first: nix should be the one of the running daemon, apt the one that knows the host's
  # mirrors and keys.
  fallbacks = onLinux [ pkgs.apt ] ++ [ pkgs.nix ];
  forTests = pkgs.python3.withPackages (py: dependencies py ++ [
    py.hypothesis
    py.mypy
    py.pytest
    py.pytest-timeout
    py.pyyaml
    py.types-pyyaml
  ]);
  # Of a copy that may be written to; what a test cannot have here it says, and it is skipped.
  check = name: inputs: command: pkgs.runCommand "nixbox-check-${name}" { nativeBuildInputs = inputs; } ''
    cp -r ${src} source
    chmod -R u+w source
    cd source
    export HOME=$TMPDIR PYTHONPATH=$PWD
    ${command}
    touch $out
  '';
in
{
  nixbox = python.buildPythonApplication {
    pname = "nixbox";
    inherit version src;
    pyproject = true;
    build-system = [ python.hatchling ];
    dependencies = dependencies python;
    # The bound is about start-up time, not about what works.
    pythonRelaxDeps = [ "typer" ];
    pythonImportsCheck = [ "nixbox" ];
    makeWrapperArgs = [
      "--prefix" "PATH" ":" (pkgs.lib.makeBinPath programs)
      "--set-default" "NIXBOX_LIBNFTABLES" "${pkgs.nftables}/lib/libnftables.so.1"
      "--set-default" "NIXBOX_LIBKRUN" "${pkgs.libkrun}/lib/libkrun.so"
      "--set-default" "NIXBOX_LIBKRUNFW" "${pkgs.libkrunfw}/lib/libkrunfw.so.5"
      "--suffix" "PATH" ":" (pkgs.lib.makeBinPath fallbacks)
    ];
    meta = {
      description = "Sandbox for coding agents: a directory in, a microVM out";
      license = pkgs.lib.licenses.asl20;
      mainProgram = "nixbox";
    };
  };

  shell = pkgs.mkShell {
    name = "nixbox-dev";
    packages = programs ++ fallbacks ++ [ pkgs.git pkgs.gnumake pkgs.nixfmt pkgs.ruff forTests ];
  };

  checks = {
    ruff = check "ruff" [ pkgs.ruff ] ''
      ruff check --no-cache .
      ruff format --no-cache --check .
    '';
    mypy = check "mypy" [ forTests ] "mypy --cache-dir $TMPDIR/mypy";
    unit = check "unit" ([ pkgs.git forTests ] ++ programs ++ fallbacks) "pytest -p no:cacheprovider tests/unit";
    nix = check "nix" ([ pkgs.git forTests ] ++ programs ++ fallbacks) "pytest -p no:cacheprovider tests/nix";
  };

  formatter = pkgs.nixfmt-tree;
}
