# What a machine on libkrun boots: the kernel that libkrunfw carries, and the directory that it has as its first root.
#   library   libkrunfw itself, which nixbox puts into the store: Nix has no place to fetch it from
#   kernel    `vmlinux`: an ELF file of one segment, which is how libkrun takes a kernel that it did not load itself
#   boot      the same tree as in the initrd, without the modules: this kernel has everything built in
{ lock, guest, busybox, runBusybox }:
let
  inherit (lock) krun;
in
assert lock.arch == "amd64" || throw "nixbox: no kernel of libkrun's for the architecture ${lock.arch}";
rec {
  library = runBusybox {
    name = krun.file;
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = krun.sha256;
    inherit (krun) origin;
  } ''
    echo "$name ($origin) is not in the Nix store; nixbox build puts it there" >&2
    exit 1
  '';

  kernel = runBusybox {
    name = "nixbox-krun-kernel";
    inherit library;
    inherit (krun) offset length load entry release;
  } ''
    fail() { echo "the kernel in libkrunfw: $*" >&2; exit 1; }
    numbers() { # pairs of a width in bytes and a number: the numbers in binary, their lowest bytes first
      while [ $# -gt 0 ]; do
        n=$1 v=$2
        shift 2
        while [ $n -gt 0 ]; do
          printf "\\$(printf %03o $((v & 255)))"
          v=$((v >> 8)) n=$((n - 1))
        done
      done
    }
    start=4096 # of the kernel in the file: a page, as the segment is aligned
    {
      # elf(5): e_ident, then e_type EXEC, e_machine X86_64, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize,
      # e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
      printf '\177ELF\2\1\1'
      numbers 1 0 8 0 2 2 2 62 4 1 8 $entry 8 64 8 0 4 0 2 64 2 56 2 1 2 64 2 0 2 0
      # p_type LOAD, p_flags RWX, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
      numbers 4 1 4 7 8 $start 8 $load 8 $load 8 $length 8 $length 8 4096
    } > header
    [ $(stat -c %s header) = 120 ] || fail "its header has a wrong length"
    truncate -s $start header
    dd if=$library of=cut bs=64K iflag=skip_bytes,count_bytes skip=$offset count=$length status=none
    mkdir $out
    cat header cut > $out/vmlinux

    [ $(stat -c %s $out/vmlinux) = $((start + length)) ] || fail "the library ends before it does"
    [ "$(head -c 4 $out/vmlinux | od -An -c | tr -d ' ')" = '177ELF' ] || fail "the result is no ELF file"
    tail -c +$((start + 1)) $out/vmlinux | cmp -n $length - $library 0 $offset || fail "it was cut at another place"
    strings $out/vmlinux | grep -qF "Linux version $release " || fail "it is no Linux $release"
    [ $entry -ge $load ] && [ $entry -lt $((load + length)) ] || fail "its entry is not in it"
  '';

  boot = runBusybox { name = "nixbox-krun-boot"; inherit busybox guest; } (import ./tree.nix "$out");
}
