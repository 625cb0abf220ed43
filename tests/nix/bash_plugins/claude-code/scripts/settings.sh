#!/usr/bin/env bash
set -euo pipefail
mkdir -p ~/.claude
echo '{ "theme": "dark" }' > ~/.claude/settings.json
