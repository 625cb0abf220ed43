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
    # Nothing of the build stays: caches, logs.
    export wash='
      eval "$leave"
      rm -f "$1"/var/cache/apt/*.bin
      rm -f "$1"/var/log/dpkg.log "$1"/var/log/apt/* "$1"/var/log/alternatives.log "$1"/var/log/bootstrap.log
      rm -rf "$1"/var/cache/debconf/tmp.ci'
    # And nothing individual: host keys, machine-id, the host's resolver and package sources.
    clean='
      eval "$wash"
      rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/resolv.conf "$1"/etc/hostname
      rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/*
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

  # Packages on top of what is there, and the hook `after` them; `finish`, which `before` sets up, reads the whole root
  # as a tar archive.
  installed = { name, base, packages, requested, before ? "", after, finish }: on {
    inherit name base;
    debs = map fetchDeb packages;
    # What was not asked for by name is "auto", so that apt autoremove in the guest knows it.
    auto = builtins.concatStringsSep " "
      (builtins.filter (name: !(builtins.elem name requested)) (map (p: p.name) packages));
    passAsFile = [ "debs" ];
  } ''
    ${before}
    mm --variant=custom --skip=update,setup,cleanup/apt/lists \
      --setup-hook="$unpack"'; mkdir "$1/tmp/repo"; mount --bind /tmp/repo "$1/tmp/repo"' \
      --setup-hook="$fake" \
      --customize-hook='chroot "$1" env DEBIAN_FRONTEND=noninteractive sh -euc "
        apt-get -q -o APT::Sandbox::User=root -o Dpkg::Options::=--force-unsafe-io -o Dpkg::Use-Pty=0 \
          -y --no-install-recommends --allow-downgrades install /tmp/repo/*.deb
        [ -z \"$auto\" ] || apt-mark auto $auto" || { eval "$unmount"; exit 1; }' \
      --customize-hook='umount "$1/tmp/repo"; rmdir "$1/tmp/repo"' \
      --customize-hook="$linked" --customize-hook="''$${after}" \
      "" - | ${finish}
  '';

  withPackages = if lock.packages == [ ] then base else installed {
    name = "nixbox-debian-packages.squashfs";
    inherit base;
    inherit (lock) packages requested;
    after = "clean";
    finish = "pack";
  };

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
  erofs = "mkfs.erofs -zlz4 --quiet -U 00000000-0000-0000-0000-000000000000 $out";

  # What lies in a sidecar is left out. A path that is not there is found here: the root image is built anyway.
  image = { tree, sidecar }: on {
    name = "nixbox-debian-root.erofs";
    root = tree;
    inherit sidecar;
  } ''
    fakeroot sh -euc 'unsquashfs -q -n -d /tmp/root $root >/dev/null
      cd /tmp/root
      for path in $sidecar; do
        [ -e ".$path" ] || [ -L ".$path" ] || { echo "nixbox: no package or build script made the sidecar $path" >&2; exit 1; }
      done
      for path in $sidecar; do rm -rf ".$path"; done
      ${erofs} /tmp/root'
  '';

  # --- sidecars: what is heavy, in images of its own beside the root (docs/decisions/030-sidecars.md) ---

  # pick LIST TREE: put into /tmp/side the paths of LIST, one a line, with the directories above them as they are.
  pick = ''
    pick() {
      awk -F/ '{ p = ""; for (i = 1; i <= NF; i++) { p = p (i > 1 ? "/" : "") $i; print p } }' "$1" |
        awk '!seen[$0]++' >/tmp/picked
      mkdir /tmp/side
      tar -C "$2" --no-recursion --verbatim-files-from --xattrs --xattrs-include='*' -cf - -T /tmp/picked |
        tar -C /tmp/side --xattrs --xattrs-include='*' -xpf - --same-owner
      touch -d "@$SOURCE_DATE_EPOCH" /tmp/side
    }
  '';

  paths = { tree, sidecar }: on {
    name = "nixbox-debian-sidecar.erofs";
    root = tree;
    inherit sidecar;
  } ''
    cat >/tmp/steps <<"END"
    ${pick}
    unsquashfs -q -n -d /tmp/root $root >/dev/null
    cd /tmp/root
    for path in $sidecar; do find ".$path"; done | sed 's,^\./,,' >/tmp/list
    pick /tmp/list /tmp/root
    ${erofs} /tmp/side
    END
    fakeroot bash -euo pipefail /tmp/steps
  '';

  # Only what the packages change of the tree: files that are new or others now, and a whiteout (the character device
  # 0, 0; Documentation/filesystems/overlayfs.rst) for each that they took away.
  packages = tree: installed {
    name = "nixbox-debian-sidecar-packages.erofs";
    base = tree;
    packages = lock.sidecar_packages;
    requested = lock.sidecar_requested;
    after = "wash"; # what a build script made is to stay
    before = ''
      cat >/tmp/steps <<"END"
      ${pick}
      mkdir /tmp/new
      tar -C /tmp/new --xattrs --xattrs-include='*' -xpf - --same-owner
      unsquashfs -q -n -d /tmp/old $base >/dev/null
      for tree in old new; do
        cd /tmp/$tree
        {
          find . -mindepth 1 -type d -printf '%y %m %U %G\t%P\n'
          find . -mindepth 1 ! -type d -printf '%y %m %U %G %s %T@ %l\t%P\n'
          find . -type f -print0 | xargs -0r sha256sum -z | tr '\0' '\n' | sed 's,  \./,\t,'
        } | LC_ALL=C sort >/tmp/$tree.is
        find . -mindepth 1 -printf '%P\n' | LC_ALL=C sort >/tmp/$tree.has
        if find . -name '*[[:cntrl:]]*' | grep -q .; then
          echo "nixbox: a file name with a control character cannot go to a sidecar" >&2
          exit 1
        fi
      done
      # The topmost of what went is enough.
      LC_ALL=C comm -23 /tmp/old.has /tmp/new.has | while read -r path; do
        [ ! -d "/tmp/new/$(dirname "$path")" ] || echo "$path"
      done >/tmp/gone
      {
        LC_ALL=C comm -13 /tmp/old.is /tmp/new.is | cut -f 2-
        while read -r path; do dirname "$path"; done </tmp/gone
      } | LC_ALL=C sort -u >/tmp/list
      pick /tmp/list /tmp/new
      while read -r path; do
        above=$(dirname "$path")
        /usr/bin/mknod "/tmp/side/$path" c 0 0
        touch -hd "@$SOURCE_DATE_EPOCH" "/tmp/side/$path"
        touch -r "/tmp/new/$above" "/tmp/side/$above"
      done </tmp/gone
      ${erofs} /tmp/side
      END
    '';
    finish = "fakeroot bash -euo pipefail /tmp/steps";
  };
}
