#!/usr/bin/env bash
# Builds images with buildah, without Docker: images/build.sh [data|ocr|train|services]...; none = all four.
#
#   REGISTRY     put before the names, with its slash at the end
#   TORCH        cuda (default) or cpu, for the train image
#   BASE_IMAGE   another base than the pinned one; it needs python3 (3.11 or newer) with venv
#   BUILD_FLAGS  further flags for buildah, such as mounts of a pip.conf and a CA bundle; of a mount
#                an empty file or folder stays in the image
set -euo pipefail
command -v buildah >/dev/null || {
  echo "error: buildah is not installed. On Debian: apt-get install buildah podman runc netavark iptables uidmap" >&2
  exit 3
}
cd "$(dirname "$0")/.."
VERSION=${VERSION:-$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)}
# with a mark when the files are not those of the commit
REVISION=${REVISION:-$(git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null || echo unknown)}
read -r -a flags <<<"${BUILD_FLAGS:-}"
[ "$#" -gt 0 ] || set -- data ocr train services

for name in "$@"; do
  arguments=(--build-arg "VERSION=$VERSION" --build-arg "REVISION=$REVISION")
  [ -z "${BASE_IMAGE:-}" ] || arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
  [ "$name" != train ] || arguments+=(--build-arg "TORCH=${TORCH:-cuda}")
  began=$SECONDS
  buildah bud --isolation "${BUILDAH_ISOLATION:-chroot}" --network host "${flags[@]}" "${arguments[@]}" \
    --file "images/$name.Containerfile" --tag "${REGISTRY:-localhost/}vlmflow-$name:$VERSION" .
  echo "vlmflow-$name:$VERSION built in $((SECONDS - began)) s"
done
