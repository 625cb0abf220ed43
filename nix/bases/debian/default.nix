# The Debian base: everything from locked .debs, nothing from nixpkgs, nothing of the host.
# Arguments as ../../image.nix documents them; returns the parts of an image.
{ lock, mirrors, system, build, buildNetwork, sidecar, guest }:
let
  fetch = import ./fetch.nix { inherit mirrors; };
  tools = import ./tools.nix { inherit lock system; inherit (fetch) fetchDeb; };
  root = import ./root.nix { inherit lock; inherit (fetch) fetchDeb; inherit (tools) inTools; };
  all = [ lock.bootstrap.package lock.kernel ] ++ lock.tools ++ lock.base_packages ++ lock.packages
    ++ sidecarPackages ++ (lock.host or [ ]);
  sidecarPackages = lock.sidecar_packages or [ ];
  tree = root.withBuild { scripts = build; network = buildNetwork; };
in
rec {
  inherit (tools) busybox runBusybox hostTools;
  kernel = import ./kernel.nix { inherit lock; inherit (fetch) fetchDeb; inherit (tools) inTools; };
  initrd = import ./initrd.nix {
    inherit (tools) inTools busybox;
    inherit kernel guest;
    modules = [
      "virtio_blk" "virtio_net" "virtio-rng" "virtio_balloon" "virtio_mmio"
      "vsock" "vmw_vsock_virtio_transport"
      "overlay" "erofs" "loop"
    ];
  };
  # null where the lock has none
  krun = if (lock.krun or null) == null then null else import ../krun.nix {
    inherit lock guest;
    inherit (tools) busybox runBusybox;
  };
  rootImage = root.image { inherit tree sidecar; };
  # Each covers the ones before it, and the root.
  sidecars = (if sidecar == [ ] then [ ] else [ (root.paths { inherit tree sidecar; }) ])
    ++ (if sidecarPackages == [ ] then [ ] else [ (root.packages tree) ]);
  # What a rebuild needs and a mirror may drop: kept as a garbage collector root beside the image.
  inputs = tools.runBusybox {
    name = "nixbox-inputs";
    debs = map fetch.fetchDeb all ++ (if krun == null then [ ] else [ krun.library ]);
    inherit (tools) busybox tools;
    passAsFile = [ "debs" ];
  } ''
    mkdir $out
    ln -s $busybox $out/busybox
    ln -s $tools $out/tools
    for deb in $(cat $debsPath); do ln -sf $deb $out/; done
  '';
  packages = map (p: { inherit (p) name version; }) (lock.base_packages ++ lock.packages ++ sidecarPackages);
}
