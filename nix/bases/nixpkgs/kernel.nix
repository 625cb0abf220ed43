# nixpkgs' kernel as bzImage and as uncompressed ELF, and its modules, in the places of the Debian base's.
{ pkgs, runBusybox, kernel }:
runBusybox {
  name = "nixbox-nixpkgs-kernel";
  inherit kernel;
  modules = kernel.modules or kernel; # an output of its own since nixpkgs 25.05
  version = kernel.modDirVersion;
  inherit (pkgs) kmod xz zstd;
} ''
  export PATH=$xz/bin:$zstd/bin:$PATH
  mkdir -p $out/modules
  cp $kernel/bzImage $out/bzImage
  echo $version > $out/release
  # Copied, for depmod writes beside them; its lists may be missing, or be of another set of modules.
  cp -r $modules/lib/modules/$version $out/modules/$version
  chmod -R u+w $out/modules
  rm -f $out/modules/$version/build $out/modules/$version/source
  mkdir -p m/lib
  ln -s $out/modules m/lib/modules
  # By its path: busybox' shell may take an applet of its own first.
  $kmod/bin/depmod -b m $version
  ${import ../vmlinux.nix}''
