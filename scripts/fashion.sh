#!/usr/bin/env bash
# Fashion-MNIST as shards of pixels: OUT/train (60,000) and OUT/test (10,000), grey, 28 x 28.
# Usage: fashion.sh [OUT [OPTIONS of run.py encode]]
#   OUT                where they are put (default: data/fashion)
#   FASHION=PLACE      Debian's dataset-fashion-mnist_*.deb, or a folder with the four *-ubyte.gz files
#                      (default: apt-get fetches the package, 31 MB; nothing is installed, no root is needed)
#   FASHION_SIZE=14    side of the images (default: 28)
# Run again, it resumes, and does nothing where the shards are there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-data/fashion} place=${FASHION:-} size=${FASHION_SIZE:-28} package=dataset-fashion-mnist
if [ -f "$out/train/index.json" ] && [ -f "$out/test/index.json" ]; then
    echo "fashion: $out/train and $out/test are there"
    exit
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
fail() { echo "error: $1" >&2; exit 2; }
either="set FASHION to Debian's ${package}_*.deb, or to a folder with the four *-ubyte.gz files"

if [ -z "$place" ]; then
    command -v apt-get >/dev/null || fail "apt-get is not here: $either"
    # As root apt-get warns that its own user cannot write into the folder, and fetches all the same.
    (cd "$scratch" && apt-get -qq download "$package" 2>said.txt) ||
        fail "apt-get download $package: $(grep -m 1 '^E:' "$scratch/said.txt" || echo failed) (apt-get update renews its lists; or $either)"
    place=$(echo "$scratch/$package"_*.deb)
fi
[ -e "$place" ] || fail "FASHION ($place) does not exist: $either"
if [ -f "$place" ]; then
    command -v dpkg >/dev/null || fail "dpkg is not here: unpack $place elsewhere, and $either"
    dpkg -x "$place" "$scratch/package" 2>"$scratch/said.txt" ||
        fail "FASHION ($place) cannot be unpacked: $(head -n 1 "$scratch/said.txt")"
    place=$scratch/package/usr/share/datasets/fashion-mnist
fi
python -m diffmoe.data.fashion "$place" "$scratch/images"
for part in train test; do
    python run.py encode --source "$scratch/images/$part" --class-names "$scratch/images/class_names.txt" \
        --image-size "$size" --channels 1 --out "$out/$part" "${@:2}"
done
