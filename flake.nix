{
  description = "nixbox: one command turns a directory into a microVM whose image Nix built from a lock file";

  # To the letter what flake.lock has as `original`, or Nix would want to lock, and so to fetch, anew.
  # What nixpkgs is not needed for does not fetch it: everything Debian, and all names and descriptions, so that
  # `nix flake show`, `nix build .#image-hello-debian` and `nix run .#nixbox-debian` work without it. `nix flake check`
  # looks at every derivation and does fetch it.
  inputs.nixpkgs.url = "github:nixos/nixpkgs/nixos-unstable";

  outputs = { self, nixpkgs }:
    let
      description = "Sandbox for coding agents: a directory in, a microVM out";
      inherit ((builtins.fromTOML (builtins.readFile ./pyproject.toml)).project) version;
      lazily = import ./nix/flake/lazily.nix;

      # Not nixpkgs.lib.genAttrs: even the names of the systems would fetch nixpkgs then.
      each = systems: f: builtins.listToAttrs (map (system: { name = system; value = f system; }) systems);
      # Where machines run; and where nixbox can be worked on.
      eachSystem = each [ "x86_64-linux" "aarch64-linux" ];
      eachDesk = each [ "x86_64-linux" "aarch64-linux" "aarch64-darwin" ];
      fromNixpkgs = system: import ./nix/flake/nixpkgs.nix {
        inherit version;
        pkgs = nixpkgs.legacyPackages.${system};
        src = self;
      };
      ofNixpkgs = system: name: meta: lazily { inherit name system meta; };

      # Where Nix fetches what was not put into the store beforehand: named by who builds (needs --impure). A mirror
      # changes no image and no application.
      mirror = builtins.getEnv "NIXBOX_DEBIAN_MIRROR";
      mirrors = if mirror == "" then { } else { debian = mirror; security = "${mirror}-security"; };

      fromDebian = lock: import ./nix/flake/application.nix {
        inherit lock mirrors version;
        source = ./.;
        pypi = builtins.getEnv "NIXBOX_PYPI_MIRROR";
      };
      debian = {
        x86_64-linux = fromDebian ./nix/flake/application-amd64.lock;
        aarch64-linux = fromDebian ./nix/flake/application-arm64.lock;
      };
      # An image has the architecture of its lock.
      hello = image: { ${image.system} = { image-hello = image; image-hello-debian = image; }; };
      images = hello (self.lib.mkImage { workspace = ./examples/hello; lock = ./nix/flake/hello.lock; inherit mirrors; });
    in
    {
      lib = {
        mkDebianImage = import ./nix/flake/debian.nix;
        mkImage = import ./nix/flake/image.nix;
        mkSandbox = given:
          let
            systems = { amd64 = "x86_64-linux"; arm64 = "aarch64-linux"; };
            inherit (import ./nix/flake/config.nix (import ./nix/flake/arguments.nix given)) lock;
            system = systems.${lock.arch};
          in
          import ./nix/flake/sandbox.nix ({
            nixbox = self.packages.${system}.nixbox-debian;
            inherit (debian.${system}) runBusybox busybox;
          } // given);
      };

      packages = eachSystem (system: rec {
        nixbox = ofNixpkgs system "nixbox-${version}" { inherit description; mainProgram = "nixbox"; }
          (fromNixpkgs system).nixbox;
        default = nixbox;
        nixbox-debian = debian.${system}.application // {
          meta = { description = "${description} (made without nixpkgs)"; mainProgram = "nixbox"; };
        };
      } // (images.${system} or { }));

      apps = eachSystem (system: rec {
        nixbox = {
          type = "app";
          program = "${self.packages.${system}.nixbox}/bin/nixbox";
          meta = { inherit description; };
        };
        default = nixbox;
        nixbox-debian = nixbox // { program = "${self.packages.${system}.nixbox-debian}/bin/nixbox"; };
      });

      devShells = eachDesk (system: {
        default = ofNixpkgs system "nixbox-dev" { description = "Everything to work on nixbox"; }
          (fromNixpkgs system).shell;
      });

      checks = eachSystem (system:
        let
          one = name: description: ofNixpkgs system "nixbox-check-${name}" { inherit description; }
            (fromNixpkgs system).checks.${name};
        in
        {
          ruff = one "ruff" "The linter, and the form of the code";
          mypy = one "mypy" "The types";
          unit = one "unit" "The tests that need nothing of the host";
          nix = one "nix" "The tests that call Nix";
        });

      formatter = eachDesk (system: ofNixpkgs system "nixfmt-tree" {
        description = "The official Nix formatter, for the whole tree";
        mainProgram = "treefmt";
      } (fromNixpkgs system).formatter);

      nixosModules = rec {
        nixbox = import ./nix/flake/nixos.nix { inherit (self) packages; };
        default = nixbox;
      };

      homeModules = rec {
        nixbox = import ./nix/flake/home.nix { inherit (self) packages; };
        default = nixbox;
      };

      templates = rec {
        default = {
          path = ./examples/hello;
          description = "A nixbox workspace: a Debian guest with jq";
        };
        workspace = default;
        flake = {
          path = ./examples/flake;
          description = "A flake that builds an image, and a program that runs machines of it";
        };
      };
    };
}
