# The nixpkgs base: the packages of one pinned revision of nixpkgs, in a root of nixbox's own; no NixOS, no systemd.
# Arguments as ../../image.nix documents them; returns the parts of an image.
# What it uses of nixpkgs is listed in docs/nixpkgs-interface.md, and tests/standin has that and nothing else.
{ lock, mirrors, system, build, buildNetwork, ldLibraries, allowUnfree, guest }:
let
  nixpkgs = import ./packages.nix { inherit lock system allowUnfree; };
  inherit (nixpkgs) pkgs find;
  busybox = pkgs.pkgsStatic.busybox;

  # As the Debian base's: a static busybox is the builder, and its applets come first in PATH.
  runBusybox = attrs: script: derivation ({
    inherit system;
    builder = "${busybox}/bin/busybox";
    args = [
      "sh"
      "-euc"
      ''
        bb=${busybox}/bin/busybox
        $bb mkdir $NIX_BUILD_TOP/.bb
        $bb --install -s $NIX_BUILD_TOP/.bb
        export PATH=$NIX_BUILD_TOP/.bb
        cd $NIX_BUILD_TOP
        ${script}''
    ];
    SOURCE_DATE_EPOCH = "1700000000";
    LC_ALL = "C";
  } // attrs);

  named = map (name: { inherit name; package = find name; }) (nixpkgs.base ++ lock.requested);
in
rec {
  inherit busybox runBusybox;
  kernel = import ./kernel.nix { inherit pkgs runBusybox; kernel = find nixpkgs.kernel; };
  initrd = import ./initrd.nix {
    inherit pkgs runBusybox busybox kernel guest;
    # Much of this is built into other kernels; nixpkgs' has as much as possible as modules.
    modules = [
      "virtio_pci" "virtio_console" "virtio_blk" "virtio_net" "virtio_rng" "virtio_balloon" "virtio_mmio" "vmgenid"
      "vsock" "vmw_vsock_virtio_transport"
      "overlay" "erofs" "ext4" "fuse" "virtiofs" "loop"
    ];
  };
  # null where the lock has none
  krun = if (lock.krun or null) == null then null else import ../krun.nix {
    inherit lock guest busybox runBusybox;
  };
  hostTools = pkgs.virtiofsd;
  sidecars = [ ]; # of the Debian base only
  rootImage = import ./root.nix {
    inherit pkgs runBusybox system lock build buildNetwork;
    packages = map (one: one.package) named;
    libraries = map find (nixpkgs.libraries ++ ldLibraries);
  };
  # What a rebuild needs and evaluation reads, kept as a garbage collector root beside the image.
  inputs = runBusybox {
    name = "nixbox-inputs";
    source = import ./source.nix { inherit lock; };
    inherit busybox kernel;
    uses = [
      pkgs.cacert pkgs.erofs-utils pkgs.fakeroot pkgs.kmod pkgs.linux-pam pkgs.nix-ld pkgs.shadow.su pkgs.sqlite
      pkgs.virtiofsd pkgs.zstd
    ] ++ map (one: one.package) named ++ (if krun == null then [ ] else [ krun.library ]);
  } ''
    mkdir $out
    ln -s $source $out/nixpkgs
    ln -s $busybox $out/busybox
    ln -s $kernel $out/kernel
    for path in $uses; do ln -sf $path $out/; done
  '';
  packages = map
    (one: { inherit (one) name; version = one.package.version or ""; })
    (named ++ [ { name = nixpkgs.kernel; package = find nixpkgs.kernel; } ]);
}
