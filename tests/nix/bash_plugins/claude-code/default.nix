pkgs: rec {
  nix.packages = builtins.attrValues { inherit (pkgs) nodejs_22 claude-code git; };

  network = {
    allow = [ "anthropic.com" "claude.ai" "npmjs.org" ];
    allowedPorts = [ 443 "80" ];
  };

  mounts = [
    "${builtins.getEnv "HOME"}/.claude/commands:~/.claude/commands:ro"
    { host = "~/.claude/agents"; guest = "~/.claude/agents"; readOnly = true; }
    { source = ~/.claude/skills; target = "~/.claude/skills"; }
  ];

  scripts = {
    "10-settings" = ./scripts/settings.sh;
    "20-check" = "command -v claude";
  };

  hooks.post-up = [
    ./scripts/sync-config.sh
    { run = "nixbox claude-code sync-config"; required = true; }
  ];
}
