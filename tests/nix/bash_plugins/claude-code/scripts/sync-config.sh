#!/usr/bin/env bash
echo "syncing $NIXBOX_NAME"
