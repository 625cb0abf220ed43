{
  description = "A nixbox image, and a program that runs machines of it in any directory";

  # An entry of your registry: nix registry add nixbox URL-OF-NIXBOX; or write the URL here.
  inputs.nixbox.url = "nixbox";

  outputs = { self, nixbox }:
    let
      # Of .nixbox/config.toml, its profile, its plugins and .nixbox/nixbox.lock, which `nixbox lock` makes. The
      # lock has an architecture, and so have these.
      image = nixbox.lib.mkImage { workspace = ./.; };
      sandbox = nixbox.lib.mkSandbox { name = "hello"; workspace = ./.; };
    in
    {
      packages.${image.system} = {
        inherit image;
        default = sandbox;
      };
    };
}
