#!/usr/bin/env bash
# Makes the peers' own environment, which benchmarks look for below their --work: lab/peers/install.sh WORK/peers
# Leaves out packages that do not install; a benchmark names the peers that are missing. llama-cpp-python comes as
# source and needs a C++ compiler: some minutes on two cores.
set -uo pipefail
python3 -m venv "${1:?usage: install.sh DIRECTORY}"
install() {
  "$environment/bin/pip" install --quiet --disable-pip-version-check "$@" || echo "not installed: $*" >&2
}
environment=$1
install gguf==0.19.0 safetensors numpy pillow
install torch==2.13.0 "transformers==5.5.*" "huggingface-hub<1.22" optimum==2.3.0 openvino==2026.4.1 nncf==3.4.0 \
  requests setuptools
# --no-deps: optimum-intel asks for torchvision too, which it does not use here and which may not fit this torch
install --no-deps optimum-intel==2.2.0 openvino-tokenizers==2026.4.1.0 openvino-genai==2026.4.1.0
CMAKE_ARGS="-DGGML_NATIVE=ON" install llama-cpp-python==0.3.36
