# An image from a lock: kernel, initrd, read-only root, sidecars, image.json; libkrun's kernel and first root if the lock has it.
#
#   lock          the parsed nixbox.lock
#   mirrors       where each repository of the lock is fetched from, e.g. { debian = "http://…/debian"; }
#   build         [ { origin = "profile dev"; script = "…"; } ]: run in the image build, as root of the image
#   buildNetwork  true: the build scripts may use the network, and the image is marked as not reproducible
#   sidecar       [ "/opt/jdk" ]: paths that packages and build scripts made, which go to an image of their own; for the
#                 Debian base only
#   ldLibraries   attributes of nixpkgs whose libraries programs from elsewhere find; for that base only
#   allowUnfree   true: packages of nixpkgs may have a licence that is not free
#
# Returns { image; inputs; }: the image, and everything that a rebuild needs.
{ lock, mirrors ? { }, build ? [ ], buildNetwork ? false, sidecar ? [ ], ldLibraries ? [ ], allowUnfree ? false }:
let
  systems = { amd64 = "x86_64-linux"; arm64 = "aarch64-linux"; };
  system = systems.${lock.arch} or (throw "nixbox: no image for the architecture ${lock.arch}");
  bases = { debian = ./bases/debian; nixpkgs = ./bases/nixpkgs; };
  ofNixpkgs = lock.base == "nixpkgs";
  base = import (bases.${lock.base} or (throw "nixbox: no base named ${lock.base}")) ({
    inherit lock mirrors system build buildNetwork;
    guest = ./guest;
  } // (if ofNixpkgs then { inherit ldLibraries allowUnfree; } else { inherit sidecar; }));
  imageJson = builtins.toJSON ({
    format = 1;
    inherit (lock) arch;
    base = lock.base;
    suite = lock.suite or null;
    requested = lock.requested;
    build = map (s: s.origin) build;
    reproducible = !(buildNetwork && build != [ ]);
    packages = base.packages;
  } // (if ofNixpkgs then { inherit (lock) nixpkgs; inherit ldLibraries; } else { })
    // (if base.krun == null then { } else { krun = { inherit (lock.krun) release origin; }; }));
in
{
  inherit (base) inputs;
  image = base.runBusybox {
    name = "nixbox-image";
    inherit imageJson; # not `meta`: newer Nix wants a set there
    inherit (base) kernel initrd rootImage sidecars;
    host = base.hostTools;
    krunKernel = base.krun.kernel or null;
    krunBoot = base.krun.boot or null;
    passAsFile = [ "imageJson" ];
  } ''
    mkdir $out
    ln -s $kernel/vmlinux $kernel/bzImage $kernel/release $out/
    ln -s $initrd $out/initrd
    ln -s $rootImage $out/root.img
    n=0
    for file in $sidecars; do
      mkdir -p $out/sidecars
      ln -s $file $out/sidecars/$n
      n=$((n + 1))
    done
    [ -z "$host" ] || ln -s $host $out/host # what the host runs for a machine
    [ -z "$krunKernel" ] || { # for machines on libkrun
      mkdir $out/krun
      ln -s $krunKernel/vmlinux $out/krun/
      ln -s $krunBoot $out/krun/boot
    }
    cp $imageJsonPath $out/image.json
  '';
}
