# Stands for the top level of nixpkgs: exactly what docs/nixpkgs-interface.md lists, with those types, and some packages
# to ask for (./offered.nix). Its derivations are real: programs and libraries of the .debs of ./lock.json, a lock of the
# Debian base beside this file, set up to find each other in the Nix store. tests/nixpkgs.py puts the tree together.
{ system, config, overlays }:
assert overlays == [ ];
assert builtins.attrNames config == [ "allowUnfree" ] && builtins.isBool config.allowUnfree;
let
  make = import ./make.nix { inherit system; };
  inherit (make) package libs bash derived tools;

  interface = {
    # --- functions; each refuses an argument that it does not know ---

    buildEnv = { name, paths, pathsToLink, extraPrefix, ignoreCollisions, postBuild }:
      assert ignoreCollisions == true; # or it would have to look for them
      make.environment { inherit name paths pathsToLink extraPrefix postBuild; };
    closureInfo = { rootPaths }: make.closure rootPaths;

    # --- packages of an image ---

    bashInteractive = bash;
    coreutils = package "coreutils" [ "coreutils" ] "";
    curl = package "curl" [ "curl" ] "";
    diffutils = package "diffutils" [ "diffutils" ] "";
    dropbear = package "dropbear" [ "dropbear-bin" ] "";
    e2fsprogs = package "e2fsprogs" [ "e2fsprogs" ] "";
    findutils = package "findutils" [ "findutils" ] "";
    gawk = package "gawk" [ "mawk" ] "ln -s mawk $out/bin/awk";
    getent = package "getent" [ "libc-bin" ] "find $out -mindepth 1 -maxdepth 1 ! -name bin -exec rm -r {} +; find $out/bin ! -name getent ! -type d -exec rm {} +";
    gnugrep = package "gnugrep" [ "grep" ] "";
    gnused = package "gnused" [ "sed" ] "";
    gnutar = package "gnutar" [ "tar" ] "";
    gzip = package "gzip" [ "gzip" ] "";
    hostname = package "hostname" [ "hostname" ] "";
    iproute2 = package "iproute2" [ "iproute2" ] "";
    less = package "less" [ "less" ] "";
    ncurses = package "ncurses" [ "ncurses-bin" "ncurses-base" ] "";
    nix = package "nix" [ "nix-bin" ] "";
    # Debian's looks for its parts at paths of Debian's, unless it is told.
    openssh = package "openssh" [ "openssh-server" "openssh-client" "openssh-sftp-server" ] ''
      mv $out/bin/sshd $out/libexec/sshd
      printf '%s\n' "#!${bash}/bin/bash" \
        "exec $out/libexec/sshd -o SshdSessionPath=$out/libexec/sshd-session -o SshdAuthPath=$out/libexec/sshd-auth \"\$@\"" \
        > $out/bin/sshd
      chmod 755 $out/bin/sshd
    '';
    perl = package "perl" [ "perl-base" ] "";
    procps = package "procps" [ "procps" ] "";
    sudo = package "sudo" [ "sudo" ] "";
    util-linux = package "util-linux" [ "util-linux" "mount" ] "rm -f $out/bin/su";
    which = package "which" [ "debianutils" ] "ln -s which.debianutils $out/bin/which";
    xz = package "xz" [ "xz-utils" ] "";

    # --- what the root and the build are made with ---

    cacert = package "cacert" [ "ca-certificates" ] ''
      mkdir -p $out/etc/ssl/certs
      cat $out/share/ca-certificates/mozilla/*.crt > $out/etc/ssl/certs/ca-bundle.crt
    '';
    erofs-utils = package "erofs-utils" [ "erofs-utils" ] "";
    # Its own script has the paths of Debian's.
    fakeroot = package "fakeroot" [ "fakeroot" "libfakeroot" ] ''
      cp x/usr/lib/*/libfakeroot/libfakeroot-sysv.so $out/lib/
      cat > $out/bin/fakeroot <<"END"
      #!@bash@/bin/bash
      started=$(@out@/bin/faked-sysv)
      export FAKEROOTKEY=''${started%%:*}
      LD_PRELOAD=@out@/lib/libfakeroot-sysv.so "$@"
      code=$?
      kill "''${started##*:}"
      exit $code
      END
      sed -i "s#@bash@#${bash}#; s#@out@#$out#" $out/bin/fakeroot
      chmod 755 $out/bin/fakeroot
    '';
    iana-etc = package "iana-etc" [ "netbase" ] "mkdir -p $out/etc; cp x/etc/protocols x/etc/services $out/etc/";
    kmod = package "kmod" [ "kmod" ] "";
    linux = make.kernel;
    linux-pam = package "linux-pam" [ "libpam-modules" ] "mkdir -p $out/lib; cp -r x/usr/lib/*/security $out/lib/";
    # Not nix-ld, which Debian does not have: the loader of its C library, at nix-ld's place.
    nix-ld = derived "nix-ld" { inherit libs; } ''
      mkdir -p $out/libexec
      cp $libs/lib/ld-linux-x86-64.so.2 $out/libexec/nix-ld
    '';
    pkgsStatic.busybox = tools.busybox;
    shadow.su = package "su" [ "util-linux" ] "find $out/bin ! -name su ! -type d -exec rm {} +; rm -r $out/share";
    sqlite = package "sqlite" [ "sqlite3" ] "";
    stdenv.cc = {
      bintools.dynamicLinker = "${libs}/lib/ld-linux-x86-64.so.2";
      cc = make.outputs "gcc" { lib = make.library "gcc-lib" [ "libstdc++6" "libgcc-s1" ]; };
    };
    tzdata = package "tzdata" [ "tzdata" ] "";
    virtiofsd = package "virtiofsd" [ "virtiofsd" ] "mv $out/libexec/virtiofsd $out/bin/";
    zlib = make.library "zlib" [ "zlib1g" ];
    zstd = package "zstd" [ "zstd" ] "";
  };
in
interface // import ./offered.nix { inherit make config; }
