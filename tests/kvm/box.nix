# Kernel and initrd of an emulated KVM host, from a lock whose kernel is Debian's for real machines.
{ lock, mirrors ? { } }:
let
  system = "x86_64-linux";
  debian = ../../nix/bases/debian;
  inherit (import (debian + "/fetch.nix") { inherit mirrors; }) fetchDeb;
  tools = import (debian + "/tools.nix") { inherit lock system fetchDeb; };
  kernel = import (debian + "/kernel.nix") { inherit lock fetchDeb; inherit (tools) inTools; };
  initrd = import (debian + "/initrd.nix") {
    inherit (tools) inTools busybox;
    inherit kernel;
    guest = ./guest;
    modules = [
      "virtio_pci" "virtio_console" "virtio_net" "9pnet_virtio" "9p" "overlay"
      "kvm" "kvm-amd" "tun" "fuse" "veth"
      # What a machine's network asks for; the box has no modprobe for this kernel.
      "nf_tables" "nft_ct" "nft_limit" "nft_log" "nft_reject_inet" "nft_masq" "nft_chain_nat" "nfnetlink_log"
    ];
  };
in
tools.runBusybox { name = "nixbox-kvm-box"; inherit kernel initrd; } ''
  mkdir $out
  ln -s $kernel/vmlinux $kernel/release $out/
  ln -s $initrd $out/initrd
''
