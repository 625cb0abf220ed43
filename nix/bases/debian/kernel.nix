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
  # Linux x86 boot protocol 2.08 and later: payload_offset (0x248, from the end of the setup sectors) and
  # payload_length (0x24c) locate the compressed ELF; its last four bytes are the unpacked size.
  u() { od -An -tu$2 -j$(($1)) -N$2 $out/bzImage | tr -d ' '; }
  offset=$(( ($(u 0x1f1 1) + 1) * 512 + $(u 0x248 4) ))
  length=$(( $(u 0x24c 4) - 4 ))
  dd if=$out/bzImage of=payload bs=1M iflag=skip_bytes,count_bytes skip=$offset count=$length status=none
  case $(od -An -tx1 -N4 payload | tr -d ' ') in
    28b52ffd) zstd -qdc payload ;;
    fd377a58) xz -dc payload ;;
    1f8b*) gzip -dc payload ;;
    *) echo "nixbox: the kernel's payload has an unknown compression" >&2; exit 1 ;;
  esac > $out/vmlinux
  [ "$(head -c 4 $out/vmlinux | od -An -c | tr -d ' ')" = '177ELF' ]
''
