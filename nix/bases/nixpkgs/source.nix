# The pinned nixpkgs tree: what the lock names by revision and hash, and nothing else. nixbox puts it into the store
# under that hash before it asks for it; Nix then needs no network, and takes nothing that has another hash.
{ lock }:
let
  inherit (lock) nixpkgs;
in
builtins.fetchTarball {
  name = "source";
  url = "https://github.com/${nixpkgs.owner}/${nixpkgs.repo}/archive/${nixpkgs.rev}.tar.gz";
  sha256 = nixpkgs.hash;
}
