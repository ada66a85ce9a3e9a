#!/usr/bin/env bash
# Packs TensorRT-RTX for a machine that has no package index and takes files in pieces.
#   scripts/pack_rtx.sh OUT [WHEEL ...]
# Writes pieces, their sums and unpack.sh into OUT, a new or empty folder. On the other machine, with all of OUT in one
# folder: ./unpack.sh TARGET joins the pieces, checks the sums, unpacks into TARGET and prints the PYTHONPATH to use.
# Without WHEEL, pip downloads the two wheels of TensorRT-RTX and pydantic, which nvlm-trt needs.
#   PIECE_MB        largest piece [32, which leaves room for the repository in a transfer of 64 MB]
#   PYTHON_VERSION  Python of the other machine [3.12]
#   PYTHON          interpreter that has pip, for the download [python3]
# NVIDIA's licence terms for TensorRT-RTX apply: read them before you download (METADATA and licenses/ of the wheels),
# copy the pieces to machines of your own only, and publish them nowhere. Never commit them.
set -euo pipefail
version=1.7.1.116
piece_mb=${PIECE_MB:-32} python_version=${PYTHON_VERSION:-3.12} python=${PYTHON:-python3}
fail() { echo "error: $1" >&2; exit 2; }

[ $# -ge 1 ] || fail "no folder to write to; use scripts/pack_rtx.sh OUT [WHEEL ...]"
out=$1
shift
[[ $piece_mb =~ ^[1-9][0-9]*$ ]] && [ "$piece_mb" -le 60 ] || fail "PIECE_MB=$piece_mb is not from 1 to 60"
command -v "$python" >/dev/null || fail "there is no $python; set PYTHON"
mkdir -p "$out"
[ -z "$(ls -A "$out")" ] || fail "$out is not empty; name a new folder"
root=$(git -C "$out" rev-parse --show-toplevel 2>/dev/null || true)
[ -z "$root" ] || git -C "$out" check-ignore -q . || fail "$out is inside the repository $root; name a folder outside it"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/wheels" "$work/site"

if [ $# -gt 0 ]; then
  for wheel in "$@"; do
    [ -f "$wheel" ] || fail "there is no wheel $wheel"
    cp "$wheel" "$work/wheels"
  done
else
  platforms=()
  for glibc in 28 27 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
  download=("$python" -m pip download -q --only-binary=:all: --python-version "$python_version" --implementation cp
    "${platforms[@]}" --platform manylinux2014_x86_64 -d "$work/wheels")
  # the libraries by name and without their needs: the metapackages are source distributions that fail
  "${download[@]}" --no-deps "tensorrt_rtx_cu13_libs==$version" "tensorrt_rtx_cu13_bindings==$version" ||
    fail "pip cannot download TensorRT-RTX $version for Python $python_version; see above"
  "${download[@]}" pydantic || fail "pip cannot download pydantic for Python $python_version; see above"
fi

for wheel in "$work"/wheels/*; do
  "$python" -m zipfile -e "$wheel" "$work/site" || fail "$wheel is not a wheel"
done
tar -C "$work/site" --sort=name --owner=0 --group=0 -cf - . | xz -T0 -6 | split -b "${piece_mb}000000" -d -a 2 - "$out/rtx.tar.xz."
(cd "$out" && sha256sum rtx.tar.xz.* >SHA256SUMS)
cat >"$out/unpack.sh" <<'UNPACK'
#!/usr/bin/env bash
# Joins the pieces beside this file, checks them, and unpacks them: ./unpack.sh TARGET (a new or empty folder)
set -euo pipefail
fail() { echo "error: $1" >&2; exit 2; }
[ $# -eq 1 ] || fail "no folder to unpack into; use unpack.sh TARGET"
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
mkdir -p "$1"
target=$(realpath "$1")
[ -z "$(ls -A "$target")" ] || fail "$target is not empty; name a new folder"
while read -r sum piece; do
  [ -f "$here/$piece" ] || fail "$here/$piece is missing; copy it again"
  found=$(sha256sum <"$here/$piece")
  [ "${found%% *}" = "$sum" ] || fail "$here/$piece is damaged (its sha256 is not that of SHA256SUMS); copy it again"
done <"$here/SHA256SUMS"
# by Python, for a bare machine may lack xz
cut -c 67- "$here/SHA256SUMS" | (cd "$here" && xargs cat) | "${PYTHON:-python3}" -W ignore -c '
import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1])' "$target"
echo "export PYTHONPATH=$target\${PYTHONPATH:+:\$PYTHONPATH}"
UNPACK
chmod +x "$out/unpack.sh"
echo "packed $(ls "$work/wheels" | wc -l) wheels into $(wc -l <"$out/SHA256SUMS") pieces of at most $piece_mb MB in $out" \
  "($(du -sm "$out" | cut -f 1) MB); NVIDIA's licence terms apply to them"
