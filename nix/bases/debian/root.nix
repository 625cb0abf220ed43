# The root file system: a base made by mmdebstrap from the locked set, then, each on top of the one before and
# each a derivation of its own so that only what changed is made again, the requested packages and the build
# scripts, each kept as a squashfs. The result is flat: one erofs, which every hypervisor's kernel can read and
# which is quicker to read (docs/decisions/026-erofs.md).
{ lock, fetchDeb, inTools }:
let
  lines = builtins.concatStringsSep "\n";
  multiarch = { amd64 = "x86_64-linux-gnu"; arm64 = "aarch64-linux-gnu"; }.${lock.arch};

  # fakeroot records owners, modes and setuid bits that the sandbox's single uid cannot hold; sqfstar reads
  # them back from the tar stream.
  prelude = ''
    trap 'code=$?; [ $code = 0 ] || echo "nixbox: the image step failed (exit $code); its last lines are above" >&2' EXIT
    mkdir -p /tmp/repo /tmp/bin
    for d in $(cat ''${debsPath:-/dev/null}); do
      file=''${d##*/}
      cp $d /tmp/repo/''${file:33}
    done
    # Under fakeroot mknod seems to work and makes plain files; a failing one makes packages leave /dev alone.
    ln -s /bin/false /tmp/bin/mknod
    export PATH=/tmp/bin:$PATH
    # chown to an id that is not mapped fails with EINVAL, which fakeroot does not forgive unless told.
    export FAKEROOTDONTTRYCHOWN=1
    # Must exist at the same path inside the target, where maintainer scripts run with it preloaded.
    export L=/usr/lib/${multiarch}/libfakeroot
    mm() { fakeroot mmdebstrap --mode=root --skip=chroot/mount/dev,chroot/mount/sys,output/dev "$@"; }
    pack() {
      sqfstar -quiet -no-progress -root-mode 0755 -root-uid 0 -root-gid 0 \
        -comp zstd -Xcompression-level 1 $out
    }
    fake='mkdir -p "$1$L"; cp $L/libfakeroot-sysv.so "$1$L"'
    # What the step itself has put into the root goes again; what a build script made stays.
    export leave='umount -l "$1/dev"; rm -r "$1$L"; rm -f "$1"/var/cache/ldconfig/aux-cache
      rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap'
    # Nothing individual and nothing of the build stays: host keys, machine-id, caches, the host's resolver.
    clean='
      eval "$leave"
      rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/resolv.conf "$1"/etc/hostname
      rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/var/cache/apt/*.bin
      rm -f "$1"/var/log/dpkg.log "$1"/var/log/apt/* "$1"/var/log/alternatives.log "$1"/var/log/bootstrap.log
      rm -rf "$1"/var/cache/debconf/tmp.ci
      : > "$1"/etc/machine-id'
    # A failed step takes its mounts away, so that the end of the log is about the failure.
    export unmount='umount -l "$1/dev" "$1/tmp/repo" "$1/tmp/build" 2>/dev/null'
    # ldconfig is static, so fakeroot does not see that it replaces its cache: what it recorded of the old one's inode
    # would be taken for the next file's that gets the number, and a symbolic link would seem to be a file.
    unpack='unsquashfs -q -n -f -d "$1" $base; rm "$1/etc/ld.so.cache"; mount --rbind /dev "$1/dev"'
    export linked='[ -e "$1/etc/ld.so.cache" ] || chroot "$1" ldconfig'
  '';
  on = attrs: script: inTools attrs (prelude + script);
in
rec {
  base = on {
    name = "nixbox-debian-base.squashfs";
    debs = map fetchDeb lock.base_packages;
    passAsFile = [ "debs" ];
    include = lines (map (name: "--include=${name}") lock.base_requested);
  } ''
    cd /tmp/repo
    apt-ftparchive --md5=no --sha1=no --sha512=no packages . > Packages
    mapfile -t include <<< "$include"
    mm --variant=essential "''${include[@]}" \
      --aptopt='APT::Sandbox::User "root"' --aptopt='APT::Install-Recommends "false"' \
      --dpkgopt=force-unsafe-io \
      --setup-hook="$fake" --extract-hook='mount --rbind /dev "$1/dev"' \
      --customize-hook="$clean" \
      "" - "deb [trusted=yes] copy:///tmp/repo ./" | pack
  '';

  withPackages = if lock.packages == [ ] then base else on {
    name = "nixbox-debian-packages.squashfs";
    inherit base;
    debs = map fetchDeb lock.packages;
    # What was not asked for by name is "auto", so that apt autoremove in the guest knows it.
    auto = builtins.concatStringsSep " "
      (builtins.filter (name: !(builtins.elem name lock.requested)) (map (p: p.name) lock.packages));
    passAsFile = [ "debs" ];
  } ''
    mm --variant=custom --skip=update,setup,cleanup/apt/lists \
      --setup-hook="$unpack"'; mkdir "$1/tmp/repo"; mount --bind /tmp/repo "$1/tmp/repo"' \
      --setup-hook="$fake" \
      --customize-hook='chroot "$1" env DEBIAN_FRONTEND=noninteractive sh -euc "
        apt-get -q -o APT::Sandbox::User=root -o Dpkg::Options::=--force-unsafe-io -o Dpkg::Use-Pty=0 \
          -y --no-install-recommends --allow-downgrades install /tmp/repo/*.deb
        [ -z \"$auto\" ] || apt-mark auto $auto" || { eval "$unmount"; exit 1; }' \
      --customize-hook='umount "$1/tmp/repo"; rmdir "$1/tmp/repo"' \
      --customize-hook="$linked" --customize-hook="$clean" \
      "" - | pack
  '';

  # The scripts of plugins and profile, in order, as root of the image. With `network` Nix's sandbox is off for
  # this one derivation (it asks for `sandbox = relaxed`); the script's root is still the image alone, with the
  # build's tools and the Nix store around it, but it reaches the host's network, its loopback included.
  withBuild = { scripts, network }: if scripts == [ ] then withPackages else on ({
    name = "nixbox-debian-built.squashfs";
    base = withPackages;
  } // (if network then { __noChroot = true; buildNetwork = "1"; } else { })
    // (builtins.listToAttrs (builtins.genList
    (i: { name = "build${toString i}"; value = (builtins.elemAt scripts i).script; })
    (builtins.length scripts)))
    // {
    passAsFile = builtins.genList (i: "build${toString i}") (builtins.length scripts);
    titles = lines (map (s: s.origin) scripts);
  }) ''
    mkdir /tmp/build
    mapfile -t titles <<< "$titles"
    for i in "''${!titles[@]}"; do
      path=build''${i}Path
      cp "''${!path}" /tmp/build/$i
      printf '%s' "''${titles[$i]}" > /tmp/build/$i.title
    done
    mm --variant=custom --skip=update,setup,cleanup/apt/lists \
      --setup-hook="$unpack"'; mkdir "$1/tmp/build"; mount --bind /tmp/build "$1/tmp/build"' \
      --setup-hook="$fake" \
      --customize-hook='[ -z "''${buildNetwork:-}" ] || cp /etc/resolv.conf "$1/etc/resolv.conf"
        n=0; while [ -e /tmp/build/$n ]; do
          title=$(cat /tmp/build/$n.title)
          echo "nixbox: build of $title" >&2
          chroot "$1" env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH \
            LD_PRELOAD="$LD_PRELOAD" LD_LIBRARY_PATH="''${LD_LIBRARY_PATH:-}" FAKEROOTKEY="$FAKEROOTKEY" \
            FAKEROOTDONTTRYCHOWN=1 sh -eu /tmp/build/$n \
            || { echo "nixbox: the build of $title failed with exit code $?" >&2; eval "$unmount"; exit 1; }
          n=$((n + 1))
        done' \
      --customize-hook='umount "$1/tmp/build"; rmdir "$1/tmp/build"
        [ -z "''${buildNetwork:-}" ] || rm -f "$1/etc/resolv.conf"' \
      --customize-hook="$linked" --customize-hook="$leave" \
      "" - | pack
  '';

  # No compression that is slow to undo: what a guest reads is read under emulation, too.
  image = { scripts, network }: on {
    name = "nixbox-debian-root.erofs";
    root = withBuild { inherit scripts network; };
  } ''
    fakeroot sh -euc 'unsquashfs -q -n -d /tmp/root $root >/dev/null
      mkfs.erofs -zlz4 --quiet -U 00000000-0000-0000-0000-000000000000 $out /tmp/root'
  '';
}
