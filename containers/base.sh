#!/bin/sh
# Prints the base image that the images can be built from here: $BASE_IMAGE, else the official one. Where no registry
# is reached, that is a stand-in made from Debian's packages, whose Python is the same 3.11.
set -eu
cd "$(dirname "$0")/.."

official=$(sed -n 's/^ARG BASE_IMAGE=//p' containers/pipeline.Dockerfile)
standin=plumbline/base:bookworm
if [ -n "${BASE_IMAGE:-}" ]; then
    echo "$BASE_IMAGE"
    exit
fi
engine=$(containers/engine.sh)
if "$engine" image inspect "$official" >/dev/null 2>&1 || "$engine" pull --quiet "$official" >/dev/null 2>&1; then
    echo "$official"
    exit
fi
if ! "$engine" image inspect "$standin" >/dev/null 2>&1; then
    echo "$official cannot be pulled; making a stand-in, $standin (a minute or two)." >&2
    if [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null 2>&1; then
        echo "That takes root and debootstrap (containers/setup-debian.sh). Or name an image: BASE_IMAGE=..." >&2
        exit 2
    fi
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-dev,python3-venv bookworm "$root" >&2
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    tar --create --directory "$root" . | "$engine" import --change 'CMD ["python3"]' - "$standin" >/dev/null
fi
echo "$standin"
