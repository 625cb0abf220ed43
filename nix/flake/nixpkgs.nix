# What the flake makes with nixpkgs: the application, the shell to work on it, the formatter.
#
# Never evaluated with nixpkgs itself so far (it could not be fetched where this was written), only with a
# stand-in that has exactly the attributes used here (tests/nix/test_flake.py). Keep them few.
{ pkgs, src, version }:
let
  python = pkgs.python3Packages;
  dependencies = py: [ py.cffi py.nix-prefetch-github py.pydantic py.sh py.tomlkit py.typer ];
  programs = [ pkgs.e2fsprogs pkgs.openssh pkgs.passt pkgs.qemu pkgs.util-linux pkgs.virtiofsd ];
  # The user's own come first: nix should be the one of the running daemon, apt the one that knows the host's
  # mirrors and keys.
  fallbacks = [ pkgs.apt pkgs.nix ];
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
    packages = programs ++ fallbacks ++ [
      pkgs.gnumake
      pkgs.nixfmt
      pkgs.ruff
      (pkgs.python3.withPackages (py: dependencies py ++ [
        py.hypothesis
        py.mypy
        py.pytest
        py.pytest-timeout
      ]))
    ];
  };

  formatter = pkgs.nixfmt-tree;
}
