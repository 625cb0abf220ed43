# A derivation whose name, system and description are known before it is: what `nix flake show` prints, and what
# choosing one output of several looks at, forces nothing of the real one. Building it does.
{ name, system, meta }: drv: {
  type = "derivation";
  inherit name system meta;
  inherit (drv) drvPath outPath;
  outputs = [ "out" ];
  outputName = "out";
}
