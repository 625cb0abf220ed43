# Packages to ask for, beside what the base itself uses: good ones, and one of each kind that cannot be had.
{ make, config }:
let
  inherit (make) package jq;
  described = drv: meta: drv // { inherit meta; };
  refuse = what: drv: drv // builtins.mapAttrs (_: _: throw "this package is ${what}") { drvPath = 0; outPath = 0; };
in
{
  inherit jq;
  extra = {
    tree = package "tree" [ "tree" ] "";
    depth.of.three = make.derived "three" { } "mkdir -p $out/share/three; echo 3 > $out/share/three/file";
  };
  # Of two outputs, and the one with the libraries is not the first.
  libjq = make.outputs "libjq" { lib = make.library "libjq-lib" [ "libjq1" "libonig5" ]; };
  costly =
    let drv = described (make.derived "costly" { } "mkdir -p $out/bin; ln -s ${jq}/bin/jq $out/bin/costly")
      { license = [ { free = true; } { free = false; } ]; };
    in if config.allowUnfree then drv else refuse "unfree" drv;
  faulty = refuse "broken" (described (make.derived "faulty" { } "exit 1") { broken = true; license.free = true; });
  gone = throw "gone was removed: use jq";
}
