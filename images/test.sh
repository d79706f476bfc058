#!/usr/bin/env bash
# Builds the images for machines without GPU and works in them as a cluster does: user 10001, root file system read-only, no
# capabilities, no network. The whole tiny recipe runs in the train image, at the size of benchmarks/kill_resume.py.
#
#   BASE_IMAGE=stand-in   Debian's packages by debootstrap, where the pinned base cannot be pulled
#   SKIP_BUILD=1          test what was built before
#   PODMAN_FLAGS          further flags of `podman run`; further settings: images/build.sh
set -euo pipefail
missing=()
for tool in buildah podman; do command -v "$tool" >/dev/null || missing+=("$tool"); done
[ "${BASE_IMAGE:-}" != stand-in ] || command -v debootstrap >/dev/null || missing+=(debootstrap)
if [ "${#missing[@]}" -gt 0 ]; then
  echo "error: ${missing[*]} not installed. On Debian: apt-get install podman buildah runc netavark iptables uidmap debootstrap" >&2
  exit 3
fi
cd "$(dirname "$0")/.."

REGISTRY=${REGISTRY:-localhost/}
VERSION=${VERSION:-$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)}
export REGISTRY VERSION TORCH=cpu
if [ -z "${SKIP_BUILD:-}" ]; then
  if [ "${BASE_IMAGE:-}" = stand-in ]; then
    images/stand_in.sh
    BASE_IMAGE=localhost/vlmflow-base:bookworm
  fi
  export BASE_IMAGE
  images/build.sh
fi

read -r -a flags <<<"${PODMAN_FLAGS:-}"
inside() { # IMAGE [FLAG...] -- COMMAND...
  local image=$1 own=()
  shift
  while [ "$1" != -- ]; do own+=("$1") && shift; done
  shift
  echo "+ vlmflow-$image: $*"
  podman run --rm --pull never --network none --user 10001:10001 --read-only --read-only-tmpfs=false --cap-drop all \
    --security-opt no-new-privileges --tmpfs /tmp:rw,mode=1777,size=2g \
    --volume "$PWD/images/checks:/checks:ro" --volume "$PWD/benchmarks:/benchmarks:ro" --env PYTHONPATH=/benchmarks \
    "${flags[@]}" "${own[@]}" "${REGISTRY}vlmflow-$image:$VERSION" "$@"
}

for image in data ocr train services; do
  inside "$image" -- python /checks/confined.py
  inside "$image" -- vlmflow recipe validate recipes/points-tiny.yaml
done
inside services -- python -m services.bootstrap --help >/dev/null
inside services -- python -m services.promoter --help >/dev/null
inside services -- python -c 'import boto3, psycopg2'  # MLflow's artifacts in S3, its tables in Postgres
inside services --tmpfs /var/lib/mlflow:rw,mode=1777 -- python /checks/servers.py
inside data -- vlmflow compile --to /tmp/compiled
inside data -- python -c 'from vlmflow.curation import caption, fuse, keep, pull; from vlmflow.registry import run'
inside ocr -- python /checks/read_text.py
inside train --tmpfs /state:rw,mode=1777,size=4g --shm-size 1g -- python /checks/pipeline.py
echo "all images passed"
