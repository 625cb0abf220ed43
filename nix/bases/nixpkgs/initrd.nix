# The initrd: the tree that every guest starts from (../tree.nix), and the modules that this kernel needs.
{ pkgs, runBusybox, busybox, kernel, guest, modules }:
runBusybox {
  name = "nixbox-initrd";
  inherit busybox kernel guest;
  modules = builtins.concatStringsSep " " modules;
  inherit (pkgs) kmod xz zstd;
} ''
  version=$(cat $kernel/release)
  mkdir -p m/lib
  ln -s $kernel/modules m/lib/modules
  ${import ../tree.nix "r"}
  for module in $modules; do
    $kmod/bin/modprobe -d m -S $version --show-depends $module || {
      echo "nixbox: kernel $version has no module $module" >&2
      exit 1
    }
  done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' > list
  # Numbered in the order in which they must be loaded; unpacked, so that the guest's insmod need not.
  n=100
  while read -r file; do
    n=$((n + 1))
    case $file in
      *.xz) $xz/bin/xz -dc $file > r/modules/$n-$(basename $file .xz) ;;
      *.zst) $zstd/bin/zstd -qdc $file > r/modules/$n-$(basename $file .zst) ;;
      *.gz) gzip -dc $file > r/modules/$n-$(basename $file .gz) ;;
      *) cp $file r/modules/$n-$(basename $file) ;;
    esac
  done < list
  find r -exec touch -hd @1 {} +
  (cd r; find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 --renumber-inodes) > $out
''
