{ pkgs }:
with pkgs;
{
  nix.packages = [ awscli2 ssm-session-manager-plugin python3Packages.boto3 "jq" ];
  network = import ./network.nix { regions = [ "eu-central-1" "us-east-1" ]; };
  mounts = [ ];
  scripts.onStart = ''
    mkdir -p ~/.aws
    chmod 700 ~/.aws
  '';
  hooks = {
    "post-up" = [ "nixbox aws login --if-expired" ];
    preDown = [ ];
  };
}
