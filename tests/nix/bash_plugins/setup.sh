#!/bin/sh
echo "setup \"quoted\""
