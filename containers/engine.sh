#!/bin/sh
# Prints the container engine of this machine: docker where it answers, else podman.
set -eu

for engine in docker podman; do
    if command -v "$engine" >/dev/null 2>&1 && "$engine" info >/dev/null 2>&1; then
        echo "$engine"
        exit
    fi
done
echo "No container engine answers. Start Docker, or install Podman; on Debian, as root: containers/setup-debian.sh" >&2
exit 2
