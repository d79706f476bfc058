#!/usr/bin/env bash
# Makes localhost/vlmflow-base:bookworm from Debian's own packages, for machines that cannot pull the pinned base.
set -euo pipefail

command -v debootstrap >/dev/null || { echo "error: debootstrap is not installed: apt-get install debootstrap" >&2; exit 3; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/root" >"$folder/log" || {
  tail -20 "$folder/log" >&2
  exit 1
}
rm -rf "$folder"/root/var/cache/apt/archives/*.deb
tar -C "$folder/root" -c . | podman import - localhost/vlmflow-base:bookworm
