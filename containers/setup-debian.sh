#!/bin/sh
# Installs on Debian what building and trying the images takes: Podman, and what makes a stand-in for the base image.
set -eu

packages="podman buildah runc netavark aardvark-dns iptables uidmap debootstrap shellcheck"
missing=""
for package in $packages; do
    case "$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null)" in
    installed) ;;
    *) missing="$missing $package" ;;
    esac
done
if [ -z "$missing" ]; then exit; fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "This is no Debian. Install Docker or Podman, and shellcheck, in this system's own way." >&2
    exit 2
fi
if [ "$(id -u)" != 0 ]; then
    echo "Not installed:$missing. As root: containers/setup-debian.sh" >&2
    exit 2
fi
apt-get update --quiet=2
# shellcheck disable=SC2086  # one word for each package
DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends $missing
