{
  description = "nixbox: one command turns a directory into a microVM whose image Nix built from a lock file";

  # To the letter what flake.lock has as `original`, or Nix would want to lock, and so to fetch, anew.
  # What nixpkgs is not needed for does not fetch it: everything Debian, and all names and descriptions, so that
  # `nix flake show` and `nix build .#image-hello-debian` work without it. `nix flake check` looks at every
  # derivation and does fetch it.
  inputs.nixpkgs.url = "github:nixos/nixpkgs/nixos-unstable";

  outputs = { self, nixpkgs }:
    let
      description = "Sandbox for coding agents: a directory in, a microVM out";
      inherit ((builtins.fromTOML (builtins.readFile ./pyproject.toml)).project) version;
      lazily = import ./nix/flake/lazily.nix;
      mkDebianImage = import ./nix/flake/debian.nix;

      # Not nixpkgs.lib.genAttrs: even the names of the systems would fetch nixpkgs then.
      eachSystem = f: builtins.listToAttrs
        (map (system: { name = system; value = f system; }) [ "x86_64-linux" "aarch64-linux" ]);
      fromNixpkgs = system: import ./nix/flake/nixpkgs.nix {
        inherit version;
        pkgs = nixpkgs.legacyPackages.${system};
        src = self;
      };

      # Where Nix fetches what nixbox has not put into the store: named by who builds (needs --impure). A mirror
      # changes no image.
      mirror = builtins.getEnv "NIXBOX_DEBIAN_MIRROR";
      mirrors = if mirror == "" then { } else { debian = mirror; security = "${mirror}-security"; };
      # An image has the architecture of its lock.
      images.x86_64-linux.image-hello-debian =
        (mkDebianImage { lock = ./nix/flake/hello.lock; inherit mirrors; }).image;
    in
    {
      lib = { inherit mkDebianImage; };

      packages = eachSystem (system: rec {
        nixbox = lazily {
          name = "nixbox-${version}";
          inherit system;
          meta = { inherit description; mainProgram = "nixbox"; };
        } (fromNixpkgs system).nixbox;
        default = nixbox;
      } // (images.${system} or { }));

      apps = eachSystem (system: rec {
        nixbox = {
          type = "app";
          program = "${self.packages.${system}.nixbox}/bin/nixbox";
          meta = { inherit description; };
        };
        default = nixbox;
      });

      devShells = eachSystem (system: {
        default = lazily {
          name = "nixbox-dev";
          inherit system;
          meta.description = "Everything to work on nixbox";
        } (fromNixpkgs system).shell;
      });

      formatter = eachSystem (system: lazily {
        name = "nixfmt-tree";
        inherit system;
        meta = { description = "The official Nix formatter, for the whole tree"; mainProgram = "treefmt"; };
      } (fromNixpkgs system).formatter);

      templates.default = {
        path = ./examples/hello;
        description = "A nixbox workspace: a Debian guest with jq";
      };
    };
}
