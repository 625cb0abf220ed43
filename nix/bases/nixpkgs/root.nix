# The root file system: one erofs of a tree that is laid out here. Programs are where the guest's scripts and most
# others look for them (/usr/bin, /etc), as links into /nix/store, which holds the closure of the packages and a
# database of it: `nix` in the guest knows what is there. The root user's files that the store cannot hold, setuid ones
# and those with other owners, are made under fakeroot, as in the Debian base.
{ pkgs, runBusybox, system, lock, packages, libraries, build, buildNetwork }:
let
  lines = builtins.concatStringsSep "\n";
  # Of a package's outputs the one with its libraries, as lib.getLib of nixpkgs chooses it.
  library = package: package.lib or package.out or package;

  # What programs from elsewhere are started by, and where it looks for their libraries by itself: nix-ld reads
  # these two below /run/current-system/sw where $NIX_LD and $NIX_LD_LIBRARY_PATH are not set.
  loader = { x86_64-linux = "lib64/ld-linux-x86-64.so.2"; aarch64-linux = "lib/ld-linux-aarch64.so.1"; }.${system};
  foreign = pkgs.buildEnv {
    name = "nixbox-ld";
    paths = map library libraries;
    pathsToLink = [ "/lib" ];
    extraPrefix = "/share/nix-ld";
    ignoreCollisions = true;
    postBuild = "ln -s ${pkgs.stdenv.cc.bintools.dynamicLinker} $out/share/nix-ld/lib/ld.so";
  };
  sw = pkgs.buildEnv {
    name = "nixbox-sw";
    paths = packages ++ [ foreign ];
    pathsToLink = [ "/bin" "/sbin" "/libexec" "/lib" "/share" "/etc" ];
    extraPrefix = "";
    ignoreCollisions = true; # of two files of one name the first package's is taken
    postBuild = "";
  };
  contents = [ sw pkgs.cacert pkgs.iana-etc pkgs.linux-pam pkgs.nix-ld pkgs.shadow.su pkgs.sudo pkgs.tzdata ];
  closure = pkgs.closureInfo { rootPaths = contents; };

  registry = builtins.toJSON {
    version = 2;
    flakes = [{
      from = { type = "indirect"; id = "nixpkgs"; };
      to = { type = "github"; inherit (lock.nixpkgs) owner repo rev; narHash = lock.nixpkgs.hash; };
    }];
  };

  network = if buildNetwork && build != [ ] then { __noChroot = true; buildNetwork = "1"; } else { };
  scripts = builtins.listToAttrs (builtins.genList
    (i: { name = "build${toString i}"; value = (builtins.elemAt build i).script; })
    (builtins.length build));
in
runBusybox ({
  name = "nixbox-nixpkgs-root.erofs";
  inherit sw closure contents registry loader;
  inherit (pkgs) cacert coreutils fakeroot nix sqlite sudo tzdata;
  bash = pkgs.bashInteractive;
  erofs = pkgs.erofs-utils;
  protocols = pkgs.iana-etc;
  ld = pkgs.nix-ld;
  pam = pkgs.linux-pam;
  su = pkgs.shadow.su;
  etc = ./etc;
  layout = ./layout;
  count = builtins.length build;
  titles = lines (map (s: s.origin) build);
  passAsFile = builtins.attrNames scripts;
} // scripts // network) ''
  trap 'code=$?; [ $code = 0 ] || echo "nixbox: the image step failed (exit $code); its last lines are above" >&2' EXIT
  export root=$NIX_BUILD_TOP/root HOME=$NIX_BUILD_TOP USER=nobody NIX_CONF_DIR=$NIX_BUILD_TOP/conf
  mkdir -p root/nix/store conf
  echo "build-users-group =" > conf/nix.conf

  # When a path was registered is the one thing of the database that is not the same each time.
  NIX_REMOTE="local?root=$root" $nix/bin/nix-store --load-db < $closure/registration
  $sqlite/bin/sqlite3 root/nix/var/nix/db/db.sqlite "UPDATE ValidPaths SET registrationTime = $SOURCE_DATE_EPOCH; VACUUM"
  rm -f root/nix/var/nix/db/reserved root/nix/var/nix/db/*-wal root/nix/var/nix/db/*-shm

  cp -r $etc etc
  chmod -R u+w etc
  sed -i "s#@pam@#$pam/lib/security#" etc/pam.d/*

  [ $count = 0 ] || unshare -Urmpf true || {
    echo "nixbox: this host forbids nested user namespaces, which the image build needs" >&2
    exit 1
  }
  export busybox=$NIX_BUILD_TOP/.bb
  # fakeroot records owners, modes and setuid bits that the sandbox's single uid cannot hold. Only programs that load
  # its library are part of that: the shell's and coreutils', not busybox'. chown to an id that is not mapped fails
  # with EINVAL, which fakeroot does not forgive unless told.
  export FAKEROOTDONTTRYCHOWN=1
  PATH=$coreutils/bin:$PATH $fakeroot/bin/fakeroot $bash/bin/bash -euo pipefail $layout/make
''
