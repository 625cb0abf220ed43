# What the pinned nixpkgs has of some names, as data: nixbox puts it into words (nixbox/image/nixpkgs.py).
#
#   names   dotted attributes
#
# Each row: { name; state; version; unfree; broken; insecure; unsupported; missing; near; }. `state` is
#   package   a package that can be used
#   refused   nixpkgs throws when it is asked
#   set       it is something else than a package
#   missing   there is no such attribute: `missing` is the part of the name, `near` what there is in its place
{ lock, system, names, withBase ? false }:
let
  inherit (import ./packages.nix { inherit lock system; allowUnfree = true; }) pkgs parts base kernel;
  try = default: value:
    let tried = builtins.tryEval value; in if tried.success then tried.value else default;

  # Step by step, for a set on the way may be missing, no set, or throw.
  walk = set: path:
    if path == [ ] then { found = set; }
    else
      let part = builtins.head path; in
      if !(try false (builtins.isAttrs set)) then { missing = part; near = [ ]; }
      else if set ? ${part} then walk set.${part} (builtins.tail path)
      else { missing = part; near = builtins.attrNames set; };

  isUnfree = license:
    builtins.any (one: builtins.isAttrs one && !(one.free or true))
      (if builtins.isList license then license else [ license ]);

  look = name:
    let
      at = walk pkgs (parts name);
      value = at.found or null;
      meta = try { } (value.meta or { });
      flag = what: try false (meta.${what} or false);
      state =
        if at ? missing then "missing"
        # Forces the value: an alias of a package that is gone throws here.
        else if !(builtins.tryEval (builtins.isAttrs value)).success then "refused"
        else if try "" (value.type or "") != "derivation" then "set"
        else if try "" value.drvPath == "" then "refused"
        else "package";
    in
    {
      inherit name state;
      version = if state == "package" then try "" (value.version or "") else "";
      unfree = state != "missing" && try false (isUnfree (meta.license or [ ]));
      broken = flag "broken";
      insecure = flag "insecure";
      unsupported = flag "unsupported";
      missing = at.missing or "";
      near = at.near or [ ];
    };
in
# First the tree as a whole: what is wrong with that is no fault of a name's.
builtins.seq (builtins.isAttrs pkgs) (map look (names ++ (if withBase then base ++ [ kernel ] else [ ])))
