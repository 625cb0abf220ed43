# lib.mkSandbox: a program that makes any directory the workspace of one configuration, on an image that is built
# already, and hands on to nixbox.
#
#   name          of the program, and of the configuration where that has none
#   nixbox        the nixbox that it runs: a derivation with bin/nixbox
#   runBusybox, busybox   as in ../bases/debian/tools.nix, for that system
#   all others    as in ./image.nix
#
# bin/NAME [DIRECTORY] [WORDS…]: writes DIRECTORY/.nixbox and nothing else, takes the image for that workspace's, and
# runs `nixbox up --locked`, or `nixbox WORDS…`. A file there that differs is never overwritten.
{ name, nixbox, runBusybox, busybox, ... }@given:
let
  inherit (builtins) concatStringsSep elemAt filter genList length listToAttrs match removeAttrs toJSON;
  toml = import ./toml.nix;
  configuration = removeAttrs given [ "name" "nixbox" "runBusybox" "busybox" ] // { portable = true; };
  described = import ./config.nix (import ./arguments.nix configuration);
  image = import ./image.nix configuration;

  carried = filter (p: !p.own) described.plugins;
  taken = filter (p: builtins.pathExists (../../plugins + "/${p.name}")) carried;
  config = described.config // {
    plugins = map (p: p.ref) described.plugins;
    packages.${described.base} = described.ownPackages;
  } // (if described.profile == null then { } else { profile = described.profile.name; })
    // (if described.config ? name then { } else { inherit name; });
  file = directory: base: text: { inherit directory base text; };
  files =
    [
      (file "." "config.toml" (toml config))
      (file "." "nixbox.lock" (lockText + "\n"))
      (file "." "gitignore" (builtins.readFile ../../examples/flake/.nixbox/.gitignore))
    ]
    ++ (if described.profile == null then [ ] else [
      (file "profiles" "${described.profile.name}.toml" (toml described.profile.data))
    ])
    ++ map (p: file "plugins/${p.name}" "plugin.toml" (toml p.data)) (filter (p: p.directory == null) carried);
  numbered = genList (i: "text${toString i}") (length files);
  texts = listToAttrs
    (genList (i: { name = "text${toString i}"; value = (elemAt files i).text; }) (length files));
  # Without pins: the plugins lie beside it.
  lockText = toJSON (removeAttrs described.lock [ "plugins" ]);
  directories = filter (p: p.directory != null) carried;
  copied = p: builtins.path { name = "nixbox-plugin"; path = p.directory; };

  refused =
    if match "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?" name == null then
      throw "nixbox: name: `${name}` may hold only letters, digits and hyphens, at most 63, with no hyphen at either end"
    else if given ? build || given ? buildNetwork then
      throw "nixbox: mkSandbox takes no `build` and no `buildNetwork`: give them in a profile, which the workspace gets too"
    else if taken != [ ] then
      throw "nixbox: plugins: `${(builtins.head taken).name}` is the name of one of nixbox's own; call it otherwise"
    else null;
in
builtins.seq refused (runBusybox (texts // {
  name = "nixbox-sandbox-${name}";
  inherit busybox image;
  program = name;
  nixbox = "${nixbox}/bin/nixbox";
  script = ./sandbox.sh;
  files = concatStringsSep "" (map (f: "${f.directory} ${f.base}\n") files);
  plugins = concatStringsSep "" (map (p: "${p.name} ${copied p}\n") directories);
  passAsFile = [ "files" "plugins" ] ++ numbered;
}) ''
  ours=$out/share/nixbox
  mkdir -p $out/bin $ours
  i=0
  while read -r directory base; do
    mkdir -p $ours/$directory
    eval "cat \"\$text''${i}Path\"" > $ours/$directory/$base
    i=$((i + 1))
  done < $filesPath
  while read -r plugin path; do
    mkdir -p $ours/plugins
    cp -r $path $ours/plugins/$plugin
  done < $pluginsPath
  mv $ours/gitignore $ours/.gitignore
  sed -e "s:@sh@:$busybox/bin/busybox sh:" -e "s:@busybox@:$busybox/bin/busybox:" -e "s:@nixbox@:$nixbox:" \
    -e "s:@image@:$image:" -e "s:@ours@:$ours:" -e "s:@name@:$program:" $script > $out/bin/$program
  chmod 755 $out/bin/$program
'' // { meta.mainProgram = name; }) # for `nix run`
