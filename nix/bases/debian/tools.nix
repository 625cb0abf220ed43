# The build's own programs, all from locked .debs: nothing of the host runs in a build.
#   busybox   static; the builder of everything here. nixbox adds it to the store under its recorded hash.
#   tools     a tree of unpacked .debs: mmdebstrap, apt, dpkg, fakeroot, squashfs-tools, …
#   hostTools what the host runs for a machine, a tree likewise; null where the lock has nothing of it
#   inTools   runs a bash script with that tree as its root, as root of a nested user namespace
{ lock, system, fetchDeb }:
let
  epoch = "1700000000"; # SOURCE_DATE_EPOCH: any constant does, it only has to be the same each time
in
rec {
  busybox = derivation {
    name = "nixbox-busybox";
    inherit system;
    deb = fetchDeb lock.bootstrap.package;
    # Reached only when nixbox has not added the output itself, on a host whose sandbox has a full busybox as
    # /bin/sh. The output's hash is fixed, so how it is made cannot change what it is.
    builder = "/bin/sh";
    args = [
      "-euc"
      ''
        bb=/bin/busybox
        $bb mkdir -p $out/bin
        $bb ar p $deb data.tar.xz | $bb xz -dc | $bb tar -xO ./usr/bin/busybox > $out/bin/busybox
        $bb chmod 555 $out/bin/busybox
      ''
    ];
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
    outputHash = lock.bootstrap.nar_hash;
  };

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
        ${script}''
    ];
  } // attrs);

  # A tree of unpacked .debs, whose maintainer scripts have not run.
  unpacked = name: packages: finish: runBusybox {
    inherit name;
    debs = map fetchDeb packages;
    passAsFile = [ "debs" ]; # one variable holds at most 128 KiB (execve(2))
  } ''
    mkdir -p $out/usr/bin $out/usr/sbin $out/usr/lib $out/usr/lib64
    for d in bin sbin lib lib64; do ln -s usr/$d $out/$d; done
    tr ' ' '\n' <$debsPath | xargs -n1 -P2 sh -euc '
      member=$(ar t "$1" | grep "^data\.tar")
      case $member in
        *.xz) unpack="xz -dc" ;; *.gz) unpack="gzip -dc" ;; *.tar) unpack=cat ;;
        *) echo "nixbox: cannot unpack $member of $1" >&2; exit 1 ;;
      esac
      ar p "$1" "$member" | $unpack | tar -x -o --no-same-permissions -C $out' sh
    rm -rf $out/usr/share/doc $out/usr/share/man $out/usr/share/locale $out/usr/share/info
    ${finish}'';

  # The links are what maintainer scripts would have set up as alternatives.
  tools = unpacked "nixbox-debian-tools" lock.tools ''
    ln -s mawk $out/usr/bin/awk
    ln -s fakeroot-sysv $out/usr/bin/fakeroot
    ln -s faked-sysv $out/usr/bin/faked
  '';

  hostTools = if (lock.host or [ ]) == [ ] then null else unpacked "nixbox-debian-host-tools" lock.host "";

  inTools = attrs: script: runBusybox ({
    inherit tools script;
    SOURCE_DATE_EPOCH = epoch;
    PYTHONHASHSEED = "0";
    LC_ALL = "C.UTF-8";
  } // attrs // { passAsFile = [ "script" ] ++ (attrs.passAsFile or [ ]); }) ''
    export T=$NIX_BUILD_TOP/.t
    mkdir $T
    unshare -Urmpf true || {
      echo "nixbox: this host forbids nested user namespaces, which the image build needs" >&2
      exit 1
    }
    exec unshare -Urmpf sh -euc '
      mount -t tmpfs -o mode=755 tmpfs $T
      for d in usr etc var proc dev tmp nix root run; do mkdir $T/$d; done
      for d in bin sbin lib lib64; do ln -s usr/$d $T/$d; done
      mount --bind $tools/usr $T/usr
      cp -r $tools/etc $tools/var $T/
      chmod -R u+w $T/etc $T/var
      printf "root:x:0:0:root:/root:/bin/bash\n" > $T/etc/passwd
      printf "root:x:0:\n" > $T/etc/group
      [ -z "''${buildNetwork:-}" ] || cat /etc/resolv.conf > $T/etc/resolv.conf
      mount -t proc proc $T/proc
      # Each device bound by itself into a directory of our own: what cleans up after a failed build with rm -r
      # finds nothing there that it could remove, whoever runs the build.
      mount -t tmpfs -o mode=755 tmpfs $T/dev
      for d in null zero full random urandom tty; do
        : > $T/dev/$d
        mount --bind /dev/$d $T/dev/$d
      done
      mkdir $T/dev/shm
      for d in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do ln -s /proc/self/''${d#*:} $T/dev/''${d%%:*}; done
      mkdir $T/nix/store
      mount --rbind /nix/store $T/nix/store
      # On the disk, not in memory: an image may be larger than what this machine has.
      mkdir $NIX_BUILD_TOP/.tmp
      mount --bind $NIX_BUILD_TOP/.tmp $T/tmp
      mkdir -p $T$NIX_BUILD_TOP
      mount --rbind $NIX_BUILD_TOP $T$NIX_BUILD_TOP
      export PATH=/usr/sbin:/usr/bin TMPDIR=/tmp HOME=/root
      # Not chroot, which root can leave: what was outside is unmounted, so there is nothing to escape to.
      mkdir $T/.outside
      cd $T
      pivot_root . .outside
      exec /usr/bin/env -u T /bin/bash -euc "umount -l /.outside; rmdir /.outside; exec bash -euo pipefail $scriptPath"'
  '';
}
