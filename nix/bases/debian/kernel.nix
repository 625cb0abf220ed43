# Kernel as bzImage and as uncompressed ELF (QEMU boots it by PVH, without the decompressor), and its modules.
{ lock, fetchDeb, inTools }:
inTools { name = "nixbox-debian-kernel"; deb = fetchDeb lock.kernel; } ''
  cd /tmp
  mkdir x
  dpkg-deb --fsys-tarfile $deb | tar -xC x --no-same-owner
  mkdir $out
  cp x/boot/vmlinuz-* $out/bzImage
  cp x/boot/config-* $out/config
  cp -r x/usr/lib/modules $out/ 2>/dev/null || cp -r x/lib/modules $out/
  version=$(ls $out/modules)
  echo $version > $out/release
  mkdir -p m/lib
  ln -s $out/modules m/lib/modules
  depmod -b m $version
  ${import ../vmlinux.nix}''
