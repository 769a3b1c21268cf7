#!/bin/sh
# Builds the images named, or all three, as plumbline/<name>:<version>, with Docker or Podman.
#   BASE_IMAGE=...     another base image
#   IMAGE_FLAGS="..."  more words for the engine's build
# pip works as it does on this machine: its configuration and its certificates are secrets of the build, which are in
# no layer. Folders of this machine that it names are mounted, which only Podman can.
set -eu
cd "$(dirname "$0")/.."

engine=$(containers/engine.sh)
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
if [ -n "$(git status --porcelain 2>/dev/null)" ]; then revision="$revision-dirty"; fi
names=${*:-pipeline train serve}

python=.venv/bin/python
if ! [ -x "$python" ]; then python=python3; fi
settings=$("$python" -m pip config list 2>/dev/null || true)
option() {
    printf '%s\n' "$settings" | sed -nE "s/^(:env:|global|install)\.$1='(.*)'$/\2/p" | head -n 1 | sed 's/\\n/ /g'
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
set --
for name in index-url extra-index-url find-links trusted-host; do
    value=$(option "$name")
    if [ -z "$value" ]; then continue; fi
    printf '%s = %s\n' "$name" "$value" >>"$scratch/options"
    for word in $value; do
        case "$word" in
        file:///*) folder=$(dirname "${word#file://}") ;; # an index, whose files lie beside it
        /*) folder=$word ;;
        *) continue ;;
        esac
        if [ "$engine" = podman ]; then
            set -- "$@" --volume "$folder:$folder:ro"
        else
            echo "warning: pip's $name is $word, a folder that a build with docker does not see" >&2
        fi
    done
done
if [ -e "$scratch/options" ]; then
    { echo '[global]' && cat "$scratch/options"; } >"$scratch/pip.conf"
    set -- "$@" --secret "id=pip.conf,src=$scratch/pip.conf"
fi
certificates=$(option cert)
certificates=${certificates:-${SSL_CERT_FILE:-}}
if [ -n "$certificates" ]; then set -- "$@" --secret "id=ca.crt,src=$certificates"; fi
if [ -n "${BASE_IMAGE:-}" ]; then set -- "$@" --build-arg "BASE_IMAGE=$BASE_IMAGE"; fi
if [ "$engine" = podman ]; then set -- "$@" --format docker; fi # the other format has no HEALTHCHECK
export DOCKER_BUILDKIT=1 # for a Docker before 23, whose own builder has no secrets

for name in $names; do
    # shellcheck disable=SC2086  # IMAGE_FLAGS are several words
    "$engine" build "$@" ${IMAGE_FLAGS:-} --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
        --file "containers/$name.Dockerfile" --tag "plumbline/$name:$version" .
done
"$engine" image ls --filter reference='*plumbline/*'
