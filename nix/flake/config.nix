# What a config, a profile and plugins come to for an image: the rules and the order of nixbox/config/load.py, where
# tests/nix/test_flake_library.py compares the two.
#
#   workspace   a directory with .nixbox/config.toml, whose config, profiles, plugins and lock are used; or null
#   config      instead of that file: its content as an attribute set, or another file's path
#   profile     a path of a .toml, an attribute set with a `name`, or a name of the workspace's; wins over the config's
#   plugins     after those of the config: names, paths of directories, or attribute sets with a `name`
#   packages    after those of the config: names
#   base        the one of the config, else "debian"
#   lock        a nixbox.lock: a path, or its content; the workspace's own if there is one
#   portable    true: plugins that a path or GitHub names are called by their last part, as a copy would be
#
# Returns { base; packages; ownPackages; build; buildNetwork; sidecar; ldLibraries; allowUnfree; lock; config; profile; plugins; }: `ownPackages` are the
# config's and the argument's alone, `build` is as ../image.nix takes it,
# `profile` null or { name; data; }, `plugins` a list of { ref; name; data; directory; } (`directory` null for an
# attribute set, `own` true for nixbox's). What is wrong is thrown with its file and field.
{ workspace ? null, config ? null, profile ? null, plugins ? [ ], packages ? [ ], base ? null, lock ? null
, portable ? false
}:
let
  inherit (builtins)
    attrNames concatMap concatStringsSep elem filter fromTOML head isAttrs isBool isList isPath isString match pathExists
    readFile removeAttrs substring;

  # --- words ---
  fail = file: field: words: throw "nixbox: ${file}: ${if field == "" then "" else "${field}: "}${words}";
  kinds = { int = "a whole number"; bool = "true or false"; string = "text"; list = "a list"; set = "a table"; };
  kind = v: kinds.${builtins.typeOf v} or "a ${builtins.typeOf v}";
  isFile = v: isPath v || (isString v && substring 0 1 v == "/");
  # `baseNameOf` of a path in the store is what follows the hash only where the path is that file's own.
  shown = file: "${baseNameOf (dirOf file)}/${baseNameOf file}";

  # --- reading ---
  # As the models of nixbox/config/schema.py have them.
  fields = {
    config = [
      "name" "profile" "base" "plugins" "packages" "scripts" "resources" "mounts" "network" "ports" "env" "hooks"
      "seeds" "ld_libraries" "debian" "nixpkgs" "machine"
    ];
    profile = [
      "description" "packages" "build" "build_network" "sidecar" "sidecar_packages" "setup" "setup_env" "disk"
    ];
    plugin = [
      "description" "packages" "build" "scripts" "requires_env" "network" "mounts" "hooks" "seeds" "commands"
      "ld_libraries"
    ];
  };
  toml = file:
    if pathExists file then fromTOML (readFile file)
    else fail (toString file) "" "is not there";
  # Of a file that is well-formed the data itself; `file` is what faults call it.
  checked = model: file: data:
    let
      unknown = filter (field: !(elem field fields.${model})) (attrNames data);
      wrong = field: test: data ? ${field} && !(test data.${field});
    in
    if !(isAttrs data) then fail file "" "must be a table, not ${kind data}"
    else if unknown != [ ] then
      fail file (head unknown) "unknown field (known here: ${concatStringsSep ", " fields.${model}})"
    else if wrong "build" isString then fail file "build" "must be text in quotes, not ${kind data.build}"
    else if wrong "build_network" isBool then
      fail file "build_network" "must be true or false, not ${kind data.build_network}"
    else builtins.seq (packagesOf "packages" file data)
      (builtins.seq (packagesOf "sidecar_packages" file data) (builtins.seq (sidecarOf file data) data));

  names = {
    debian = "[a-z0-9][a-z0-9+.-]+";
    nixpkgs = "[A-Za-z_][A-Za-z0-9_'.+-]*";
  };
  listed = file: field: pattern: value:
    if !(isList value) then fail file field "must be a list, not ${kind value}"
    else builtins.genList
      (i:
        let name = builtins.elemAt value i; at = "${field}[${toString i}]"; in
        if !(isString name) then fail file at "must be text in quotes, not ${kind name}"
        else if match names.${pattern} name == null then fail file at "`${name}` is no name of a package of ${pattern}"
        else name)
      (builtins.length value);
  # A plain list is meant for whichever base there is, a table says for which.
  packagesOf = field: file: data:
    let
      said = data.${field} or [ ];
      other = filter (key: !(names ? ${key})) (attrNames said);
      all = builtins.mapAttrs (key: listed file "${field}.${key}" key) said;
    in
    if !(isAttrs said) then strict (listed file field chosenBase said)
    else if other != [ ] then fail file "${field}.${head other}" "unknown field (known here: debian, nixpkgs)"
    else builtins.deepSeq all (all.${chosenBase} or [ ]);
  # Paths of the image. Which of them a guest cannot start without is nixbox's to say (nixbox/config/fields.py).
  sidecarOf = file: data:
    let
      said = data.sidecar or [ ];
      isPlain = path: isString path && match "(/[A-Za-z0-9._+@%:~-]+)+" path != null && match ".*/\\.\\.?(/.*)?" path == null;
      wrong = filter (path: !(isPlain path)) said;
    in
    if !(isList said) then fail file "sidecar" "must be a list, not ${kind said}"
    else if wrong != [ ] then
      fail file "sidecar" "${builtins.toJSON (head wrong)} is not a path in the image: write it whole and plain, such as `/opt/jdk`"
    else said;
  strict = v: builtins.deepSeq v v;

  # --- the user's own config ---
  directory = "${toString workspace}/.nixbox";
  inWorkspace = rest: workspace + "/.nixbox/${rest}";
  configFile =
    if config != null then (if isFile config then shown config else "config")
    else ".nixbox/config.toml";
  # Its base says what `packages` means, and is read before all else is checked.
  rawUser =
    if config != null then (if isFile config then toml config else config)
    else if workspace == null then { }
    else if pathExists (inWorkspace "config.toml") then toml (inWorkspace "config.toml")
    else fail directory "" "has no config.toml (a config.nix is not read here: nixbox init --from converts one)";
  user = checked "config" configFile rawUser;
  chosenBase =
    let said = if base != null then base else (if isAttrs rawUser then rawUser.base or "debian" else "debian"); in
    if names ? ${said} then said else fail configFile "base" "must be `debian` or `nixpkgs`, not `${said}`";

  # --- plugins ---
  ownPlugins = ../../plugins;
  pluginAt = { ref, name, place, own ? false }:
    if pathExists (place + "/plugin.toml") then {
      inherit ref name own;
      directory = place;
      data = checked "plugin" "${name}/plugin.toml" (toml (place + "/plugin.toml"));
    }
    else if pathExists (place + "/default.nix") then
      fail configFile "plugins" "`${ref}` is a plugin in Nix's language, which only `nixbox` itself reads so far"
    else fail configFile "plugins" "no plugin `${ref}`: ${toString place}/plugin.toml is not there";
  called = ref: name: if portable then name else ref;
  plugin = p:
    if isAttrs p then
      if !(p ? name) then fail "plugins" "name" "is missing in an attribute set"
      else {
        ref = p.name;
        inherit (p) name;
        own = false;
        directory = null;
        data = checked "plugin" "plugins.${p.name}" (removeAttrs p [ "name" ]);
      }
    else if isFile p then pluginAt { ref = baseNameOf p; name = baseNameOf p; place = p; }
    else if !(isString p) then fail configFile "plugins" "must be names, paths or tables, not ${kind p}"
    else if substring 0 7 p == "github:" then pinned p
    else if match "\\.\\.?/.*" p != null then
      if workspace == null then fail configFile "plugins" "`${p}` needs a workspace; name it by a path of Nix's"
      else pluginAt { ref = called p (baseNameOf p); name = baseNameOf p; place = workspace + "/${p}"; }
    else if match "~.*" p != null then fail configFile "plugins" "`${p}`: there is no home directory here; name it by a path"
    else if pathExists (ownPlugins + "/${p}") then
      pluginAt { ref = p; name = p; place = ownPlugins + "/${p}"; own = true; }
    else if workspace != null && pathExists (inWorkspace "plugins/${p}") then
      pluginAt { ref = p; name = p; place = inWorkspace "plugins/${p}"; }
    else fail configFile "plugins"
      "no plugin `${p}`: neither nixbox nor the workspace has one (those of ~/.config/nixbox are not seen here)";
  # From GitHub as the lock pins it, by the path in the store that nixbox has put it to.
  pinned = ref:
    let
      parts = match "github:([^/@]+)/([^/@]+)(/([^@]+))?(@.*)?" ref;
      pins = filter (pin: pin.ref == ref) (theLock.plugins or [ ]);
      pin = head pins;
      subdir = builtins.elemAt parts 3;
      name = if subdir == null then builtins.elemAt parts 1 else baseNameOf subdir;
      tree = fetchTarball {
        name = "source";
        url = "https://github.com/${builtins.elemAt parts 0}/${builtins.elemAt parts 1}/archive/${pin.rev}.tar.gz";
        sha256 = pin.hash;
      };
    in
    if parts == null then fail configFile "plugins" "`${ref}` is not github:OWNER/REPO[/SUBDIR][@REF]"
    else if pins == [ ] then fail configFile "plugins" "the lock has no pin of `${ref}`: `nixbox update` writes it"
    else pluginAt { ref = called ref name; inherit name; place = tree + (if subdir == null then "" else "/${subdir}"); };
  wantedPlugins =
    let said = user.plugins or [ ]; in
    if isList said then said ++ plugins else fail configFile "plugins" "must be a list, not ${kind said}";
  used = map plugin wantedPlugins;

  # --- the profile ---
  wantedProfile = if profile != null then profile else user.profile or null;
  found =
    if wantedProfile == null then null
    else if isAttrs wantedProfile then
      if !(wantedProfile ? name) then fail "profile" "name" "is missing in an attribute set"
      else {
        inherit (wantedProfile) name;
        data = checked "profile" "profile.${wantedProfile.name}" (removeAttrs wantedProfile [ "name" ]);
      }
    else if isFile wantedProfile then profileAt (stem (baseNameOf wantedProfile)) wantedProfile
    else if !(isString wantedProfile) then fail configFile "profile" "must be text in quotes, not ${kind wantedProfile}"
    else if workspace == null then
      fail configFile "profile" "`${wantedProfile}` needs a workspace; give the profile as a path or a table"
    else if !(pathExists (inWorkspace "profiles/${wantedProfile}.toml")) then
      fail configFile "profile" "no profile `${wantedProfile}`: ${directory}/profiles/${wantedProfile}.toml is not there"
    else profileAt wantedProfile (inWorkspace "profiles/${wantedProfile}.toml");
  stem = file:
    let parts = match "(.*)\\.toml" file; in
    if parts == null then fail file "" "is no .toml, as a profile has to be" else head parts;
  profileAt = name: file: { inherit name; data = checked "profile" "profiles/${name}.toml" (toml file); };

  # --- merging: lists are joined in this order, without doubles ---
  joined = builtins.foldl' (seen: x: if elem x seen then seen else seen ++ [ x ]) [ ];
  layers =
    map (p: { origin = "plugin ${p.ref}"; file = "${p.name}/plugin.toml"; inherit (p) data; }) used
    ++ (if found == null then [ ] else [
      { origin = "profile ${found.name}"; file = "profiles/${found.name}.toml"; inherit (found) data; }
    ])
    ++ [{ origin = "config.toml"; file = configFile; data = user; }];
  scripts = concatMap
    (layer: if layer.data ? build then [{ inherit (layer) origin; script = layer.data.build; }] else [ ])
    layers;
  firstOf = builtins.foldl'
    (seen: s: if elem s.script (map (t: t.script) seen) then seen else seen ++ [ s ]) [ ];
  ownPackages = joined (packagesOf "packages" configFile user ++ listed "packages" "packages" chosenBase packages);
  allPackages = joined (concatMap (layer: packagesOf "packages" layer.file layer.data) layers ++ ownPackages);

  sidecarPackages = if found == null then [ ] else joined (packagesOf "sidecar_packages" "profile" found.data);

  # --- the lock ---
  theLock =
    if isAttrs lock then lock
    else if lock != null then json lock
    else if workspace != null && pathExists (inWorkspace "nixbox.lock") then json (inWorkspace "nixbox.lock")
    else if workspace != null then fail directory "" "has no nixbox.lock: `nixbox lock` makes it (and git must know it)"
    else throw "nixbox: lock: is missing: the path of a nixbox.lock, which `nixbox lock` makes";
  json = file:
    if pathExists file then builtins.fromJSON (readFile file) else fail (toString file) "" "is not there";
  sorted = builtins.sort (a: b: a < b);
  without = some: filter (x: !(elem x some));
  fitting =
    let
      beside = theLock.sidecar_requested or [ ];
      new = sorted (without (theLock.requested ++ beside) (allPackages ++ sidecarPackages));
      gone = sorted (without (allPackages ++ sidecarPackages) (theLock.requested ++ beside));
      suite = user.debian.suite or null;
      differences =
        (if new == [ ] then [ ] else [ "new: ${concatStringsSep ", " new}" ])
        ++ (if gone == [ ] then [ ] else [ "gone: ${concatStringsSep ", " gone}" ]);
      refused = words: throw "nixbox: lock: ${words}; `nixbox lock` with this configuration makes one that fits";
    in
    if theLock.base or null != chosenBase then
      refused "is for the base ${theLock.base or "of another format"}, and the config's is ${chosenBase}"
    else if chosenBase == "debian" && suite != null && suite != theLock.suite then
      refused "is for ${theLock.suite}, and the config says ${suite}"
    else if differences != [ ] then refused "has other packages (${concatStringsSep "; " differences})"
    else if sorted beside != sorted sidecarPackages then refused "has other packages in the sidecar"
    else theLock;
in
{
  base = chosenBase;
  packages = allPackages;
  inherit ownPackages;
  build = firstOf scripts;
  buildNetwork = found != null && (found.data.build_network or false);
  sidecar = if found == null then [ ] else joined (sidecarOf "profile" found.data);
  ldLibraries = joined (concatMap
    (layer: listed layer.file "ld_libraries" "nixpkgs" (layer.data.ld_libraries or [ ])) layers);
  allowUnfree = user.nixpkgs.allow_unfree or false;
  lock = fitting;
  config = user // { base = chosenBase; };
  profile = found;
  plugins = used;
}
