#!/usr/bin/env bash
# Makes `import tensorrt` work without a GPU and without the builder, to check calls against the real Python API: puts the
# real bindings over the real lean runtime (46 MB from the package index), with stubs of six C functions in place of the
# builder, its plugins and the ONNX parser. Creating a builder returns null; classes, enums, signatures, tensorrt.plugin
# and the plugin registry are real.
#   lab/tensorrt_shim.sh DIRECTORY
#   LD_LIBRARY_PATH=DIRECTORY/lib PYTHONPATH=DIRECTORY/python python -c 'import tensorrt'
# PYTHON names the interpreter of the bindings, TENSORRT_VERSION another version.
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 DIRECTORY" >&2; exit 2; }
target=$(realpath -m "$1")
[ ! -e "$target" ] || { echo "error: $target exists; remove it to make it again" >&2; exit 2; }
python=${PYTHON:-python3}
version=${TENSORRT_VERSION:-11.4.0.106}

mkdir -p "$(dirname "$target")"
work=$(mktemp -d "$target.XXXXXX") # renamed when complete
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/wheels" "$work/lib" "$work/python/tensorrt"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$work/wheels" \
  "tensorrt-cu13-bindings==$version" "tensorrt-lean-cu13-libs==$version"
for wheel in "$work"/wheels/*.whl; do
  "$python" -m zipfile -e "$wheel" "$work/python"
done
rm -r "$work/wheels"
mv "$work"/python/tensorrt_lean_libs/libnvinfer_lean.so.* "$work/lib/"
major=$(basename "$work"/lib/libnvinfer_lean.so.* | sed 's/.*\.so\.//')

# stub NAME [LINKER ARGUMENT ...] < source
stub() {
  gcc -shared -fPIC -x c -o "$work/lib/lib$1.so.$major" -Wl,-soname,"lib$1.so.$major" - "${@:2}"
}
stub nvinfer -L"$work/lib" -l:"libnvinfer_lean.so.$major" -Wl,-rpath,'$ORIGIN' <<'C'
extern void *getPluginRegistry(void);
void *createInferBuilder_INTERNAL(void *logger, int version) { return 0; }
void *getBuilderPluginRegistry(int capability) { return getPluginRegistry(); }
C
stub nvinfer_plugin <<'C'
int initLibNvInferPlugins(void *logger, const char *library_namespace) { return 1; }
C
stub nvonnxparser <<'C'
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
C

cat >"$work/python/tensorrt/__init__.py" <<'PYTHON'
import sys

from tensorrt_bindings import *  # as NVIDIA's own tensorrt package does
from tensorrt_bindings import __version__
import tensorrt_bindings.plugin as plugin

sys.modules["tensorrt.plugin"] = plugin
PYTHON
chmod 755 "$work"
mv "$work" "$target"
trap - EXIT
