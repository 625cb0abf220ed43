# How the stand-in's derivations are made of .debs: see ./default.nix.
{ system }:
let
  lock = builtins.fromJSON (builtins.readFile ./lock.json);
  inherit (import ./debian/fetch.nix { mirrors = { }; }) fetchDeb;
  every = lock.base_packages ++ lock.packages ++ lock.tools ++ (lock.host or [ ]) ++ [ lock.kernel ];
  byName = builtins.listToAttrs (map (p: { inherit (p) name; value = p; }) every);
  deb = name: fetchDeb byName.${name} or (throw "the stand-in's lock has no ${name}");
  # Without what Debian puts around it: 1:2.0-3+b1 is 2.0.
  versionOf = name: builtins.elemAt (builtins.match "([0-9]+:)?([^-]+).*" byName.${name}.version) 1;

  unpack = ''
    mkdir -p x/usr/bin x/usr/sbin x/usr/lib x/usr/lib64
    for d in bin sbin lib lib64; do ln -s usr/$d x/$d; done
    for d in $(cat $debsPath); do
      member=$(ar t "$d" | grep "^data\.tar")
      case $member in
        *.xz) unpack="xz -dc" ;; *.gz) unpack="gzip -dc" ;; *.tar) unpack=cat ;;
        *) echo "cannot unpack $member of $d" >&2; exit 1 ;;
      esac
      ar p "$d" "$member" | $unpack | tar -x -o --no-same-permissions -C x
    done
    rm -rf x/usr/share/doc x/usr/share/man x/usr/share/locale x/usr/share/info x/usr/share/lintian x/usr/share/bug
  '';
in
rec {
  tools = import ./debian/tools.nix { inherit lock system fetchDeb; };

  # A derivation with what nixpkgs' have; `more` is its environment.
  derived = name: more: script: with-meta name "1" (tools.runBusybox ({ inherit name; } // more) ("cd $NIX_BUILD_TOP\n" + script));
  with-meta = pname: version: drv: drv // { type = "derivation"; inherit pname version; meta.license.free = true; };

  # A package of several outputs, `out` without anything of interest.
  outputs = name: others: derived name { } "mkdir -p $out/share/${name}" // others;

  # Every shared library there is, and the loader: what programs here are linked to.
  libs = tools.runBusybox {
    name = "standin-libs";
    debs = map fetchDeb every;
    passAsFile = [ "debs" ];
  } ''
    cd $NIX_BUILD_TOP
    ${unpack}
    mkdir -p $out/lib $out/libexec
    cp -P x/usr/lib/*-linux-gnu/*.so* $out/lib/ # the loader is among them
    cp x/usr/bin/patchelf $out/libexec/
  '';

  library = name: debs: with-meta name (versionOf (builtins.head debs)) (tools.runBusybox {
    inherit name;
    debs = map deb debs;
    passAsFile = [ "debs" ];
  } ''
    cd $NIX_BUILD_TOP
    ${unpack}
    mkdir -p $out/lib
    cp -P x/usr/lib/*-linux-gnu/*.so* $out/lib/
  '');

  # The programs of some .debs, with the loader and the libraries of `libs`; x has the .debs for `finish`.
  package = name: debs: finish: with-meta name (versionOf (builtins.head debs)) (tools.runBusybox {
    inherit name libs;
    debs = map deb debs;
    passAsFile = [ "debs" ];
  } ''
    cd $NIX_BUILD_TOP
    ${unpack}
    mkdir -p $out/bin $out/libexec $out/lib $out/share
    cp -P x/usr/bin/* x/usr/sbin/* $out/bin/ 2>/dev/null || :
    [ ! -d x/usr/libexec ] || cp -r x/usr/libexec/. $out/libexec/
    [ ! -d x/usr/lib/openssh ] || cp -r x/usr/lib/openssh/. $out/libexec/
    [ ! -d x/usr/share ] || cp -r x/usr/share/. $out/share/
    chmod -R u+w $out
    loader=$libs/lib/ld-linux-x86-64.so.2
    patchelf() { $loader --library-path $libs/lib $libs/libexec/patchelf "$@"; }
    find $out/bin $out/libexec -type f | while read -r file; do
      case $(head -c 4 $file | od -An -c | tr -d ' ') in
        177ELF)
          # DT_RPATH, not DT_RUNPATH: for the libraries of its libraries, too.
          if patchelf --print-interpreter $file >/dev/null 2>&1; then
            patchelf --set-interpreter $loader --force-rpath --set-rpath $libs/lib:$out/libexec/sudo $file
          else
            patchelf --remove-rpath $file 2>/dev/null || :
          fi
          ;;
        '#!'*) sed -i '1s,^#! */bin/sh,#!${if name == "bash" then "/bin/sh" else "${bash}/bin/sh"},' $file ;;
      esac
    done
    ${finish}
    find $out -depth -type d -empty -exec rmdir {} \;
    mkdir -p $out
  '');

  bash = package "bash" [ "bash" ] "ln -s bash $out/bin/sh";
  jq = package "jq" [ "jq" ] "";

  kernel =
    let p = lock.kernel; in with-meta "linux" (versionOf p.name) (tools.runBusybox {
      name = "linux";
      debs = [ (fetchDeb p) ];
      passAsFile = [ "debs" ];
    } ''
      cd $NIX_BUILD_TOP
      ${unpack}
      mkdir -p $out/lib
      cp x/boot/vmlinuz-* $out/bzImage
      cp -r x/usr/lib/modules $out/lib/ 2>/dev/null || cp -r x/lib/modules $out/lib/
    '') // { modDirVersion = builtins.head (builtins.match "linux-image-(.*)" p.name); };

  # As nixpkgs' closureInfo: `registration` for `nix-store --load-db`, `store-paths` one a line.
  closure = rootPaths: derivation {
    name = "closure-info";
    inherit system;
    __structuredAttrs = true;
    exportReferencesGraph.closure = rootPaths;
    builder = "${bash}/bin/bash";
    args = [
      "-euc"
      ''
        attrs=.attrs.json # in Nix 2.8 the variable names a place outside the sandbox
        [ -e $attrs ] || attrs=$NIX_ATTRS_JSON_FILE
        jq=${jq}/bin/jq bb=${tools.busybox}/bin/busybox
        out=$($jq -r .outputs.out $attrs)
        $bb mkdir $out
        $jq -r '.closure[] | .path, .narHash, .narSize, "", (.references | length), .references[]' $attrs > $out/registration
        $jq -r '.closure[].path' $attrs > $out/store-paths
      ''
    ];
  };

  # As nixpkgs' buildEnv with ignoreCollisions: links to the files of the paths; the first of a name is taken.
  environment = { name, paths, pathsToLink, extraPrefix, postBuild }: derived name { inherit paths pathsToLink; } ''
    mkdir -p $out${extraPrefix}
    for path in $paths; do
      for top in $pathsToLink; do
        [ -d $path$top ] || continue
        (cd $path; find .$top/ -type d) | while read -r d; do mkdir -p $out${extraPrefix}/$d; done
        (cd $path; find .$top/ ! -type d) | while read -r f; do
          [ -e $out${extraPrefix}/$f ] || [ -L $out${extraPrefix}/$f ] || ln -s $path/$f $out${extraPrefix}/$f
        done
      done
    done
    ${postBuild}
  '';
}
