#!/bin/sh
# Installs Debian packages that an image lacks: packages.sh NAME...; asks nobody where all are there.
set -eu
missing=
for name in "$@"; do
    case $name in
        # where an image has a Python of its own, Debian's is not wanted beside it
        python3) python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3 python3-venv" ;;
        *) [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing="$missing $name" ;;
    esac
done
[ -n "$missing" ] || exit 0
apt-get update -q
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
rm -rf /var/lib/apt/lists/*
