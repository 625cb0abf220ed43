# Scala and sbt. Caches are seeded from the host: a cache on virtiofs is slow, and its daemon never forgets a file.
{ pkgs, lib ? pkgs.lib, ... }:

let
  jdk = pkgs.jdk21;
in
{
  nix = {
    packages = with pkgs; [
      sbt
      scala
    ] ++ [ jdk ] ++ lib.optionals stdenv.isLinux [ coursier ];
    ldLibraries = with pkgs; [
      stdenv.cc.cc.lib
      zlib
    ];
  };

  network.allowedDomains = [
    "repo1.maven.org"
    "repo.maven.apache.org"
    "repo.scala-sbt.org"
    "scala-sbt.org"
  ] ++ map (name: "${name}.typesafe.com") [ "repo" "dl" ];

  scripts = [
    ''
      # Written anew at each start: sbt reads the resolver's password from here.
      mkdir -p ~/.sbt
      if [ -n "''${MAVEN_REPO_USER:-}" ]; then
        printf 'realm=%s\nhost=%s\nuser=%s\npassword=%s\n' "$MAVEN_REPO_REALM" "$MAVEN_REPO_HOST" \
          "$MAVEN_REPO_USER" "$MAVEN_REPO_PASSWORD" > ~/.sbt/.credentials
      fi
    ''
    "${pkgs.sbt}/bin/sbt --version >/dev/null"
  ];

  hooks.postUp = "nixbox scala-sbt warm-cache";
}
