#!/bin/sh
# Runs inside a build, in the folder with the sources: `install.sh libraries [EXTRA]...` puts what the project needs
# into /opt/venv, `install.sh project` the project itself into /opt/project, which is copied over it.
# pip's configuration and a bundle of certificates are there only while it runs, where the build was given them.
set -eu

secrets=/run/secrets
if [ -e "$secrets/pip.conf" ]; then export PIP_CONFIG_FILE="$secrets/pip.conf"; fi
if [ -e "$secrets/ca.crt" ]; then export PIP_CERT="$secrets/ca.crt"; fi
export PIP_CONSTRAINT="$PWD/constraints.txt" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
tools=/opt/tools/bin

# The root of an image cannot be written, so bytecode is made here; it holds whatever time a copy gives a file.
# compileall says no to files that are templates and no Python.
compile() {
    "$tools/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash -s "$1" -p / "$2" || true
}

case "$1" in
libraries)
    shift
    python3 -m venv /opt/tools
    python3 -m venv --without-pip /opt/venv
    "$tools/python" containers/requirements.py "$@" >/tmp/requirements.txt
    "$tools/pip" --python /opt/venv/bin/python install --no-compile --requirement /tmp/requirements.txt
    compile / /opt/venv/lib
    ;;
project)
    "$tools/pip" --python /opt/venv/bin/python install --no-compile --no-deps --root /opt/project .
    compile /opt/project /opt/project
    ;;
esac
