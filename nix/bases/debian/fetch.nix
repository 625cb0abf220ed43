# One fixed-output derivation per .deb. The mirror is not part of any dependent's hash: the same bits from
# another mirror are the same input. nixbox puts the files into the store itself where it can (faster); this is
# what Nix does when they are not there yet.
{ mirrors }:
let
  # Store path names allow neither of these (Nix manual, "store path").
  storeName = builtins.replaceStrings [ "~" ":" "%" ] [ "-" "-" "-" ];
  urlPath = builtins.replaceStrings [ "+" "~" ":" "%" ] [ "%2b" "%7e" "%3a" "%25" ];
in
rec {
  debName = p: storeName "${p.name}_${p.version}_${p.arch}.deb";

  fetchDeb = p: derivation {
    name = debName p;
    system = "builtin";
    builder = "builtin:fetchurl";
    # Without a mirror the host name says what to do; a build whose files are in the store never looks at it.
    url = "${mirrors.${p.repo} or "http://set-debian-mirror-in-nixbox-config.invalid"}/${urlPath p.path}";
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = p.sha256;
    preferLocalBuild = true;
    unpack = false;
    executable = false;
    impureEnvVars = [ "http_proxy" "https_proxy" "all_proxy" "no_proxy" ];
  };
}
