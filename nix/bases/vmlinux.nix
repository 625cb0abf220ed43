# Shell text that takes the uncompressed ELF kernel, $out/vmlinux, out of $out/bzImage.
''
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
