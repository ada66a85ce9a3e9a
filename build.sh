#!/usr/bin/env bash
# Sets up .venv, then:  ./build.sh          build engines of the tiny models, serve each, ask it about a picture
#                       ./build.sh test     lint, types and every test
#                       ./build.sh COMMAND  any nvlm-trt command, for example: ./build.sh ask --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {
  echo "error: $*" >&2
  exit 2
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.10, 3.11 or 3.12 on PATH; install one or set PYTHON=/path/to/python3"
}

# pip_install LOG ARGUMENT...: quiet, unless it fails.
pip_install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${@:2}" >"$1" 2>&1 || {
    cat "$1" >&2
    return 1
  }
}

# install SET: bring .venv to the pinned requirements of a set (runtime or test), unless it is there already.
install() {
  local list=requirements/$1.txt stamp log=.venv/pip.log
  if [ ! -x .venv/bin/python ]; then
    local python
    python=$(find_python)
    "$python" -m venv .venv ||
      fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  if .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))'; then
    [ "$1" = runtime ] || fail "the tests need Python 3.11 or 3.12; remove .venv and set PYTHON=/path/to/python3"
    list=requirements/runtime-3.10.txt
  fi
  stamp=.venv/installed-$1-$(cat "$list" pyproject.toml | sha256sum | cut -c1-16)
  [ -e "$stamp" ] && return
  echo "Installing $list into .venv ..." >&2
  pip_install "$log" -r "$list" || fail "pip could not install $list; see its messages above"
  pip_install "$log" --no-deps --editable . || fail "pip could not install nvlm-trt itself; see its messages above"
  touch "$stamp"
}

# run COMMAND ...: show an nvlm-trt command as a user would type it, then run it.
run() {
  local word line=
  for word in "$@"; do
    case $word in
      *[!a-zA-Z0-9_./:=-]*) line+=" \"$word\"" ;;
      *) line+=" $word" ;;
    esac
  done
  printf '\n$ ./build.sh%s\n' "$line" >&2
  .venv/bin/nvlm-trt "$@"
}

# ask_served ENGINE IMAGE QUESTION: serve one engine, ask it one question over gRPC, stop the server.
ask_served() {
  local engine=$1 image=$2 question=$3 log address=
  log=$(mktemp)
  printf '\n$ ./build.sh serve %s --grpc-port 0 --http-port 0 --metrics-port 0\n' "$engine" >&2
  .venv/bin/nvlm-trt serve "$engine" --grpc-port 0 --http-port 0 --metrics-port 0 >"$log" &
  server=$!
  until address=$(grep -om1 'grpc://[^ ]*' "$log"); do
    kill -0 "$server" 2>/dev/null || fail "the server did not start; see its message above"
    sleep 0.1
  done
  echo "serving at $address" >&2
  run ask "$question" --image "$image" --url "$address" --stats
  kill -TERM "$server"
  wait "$server"
  server=
  rm -f "$log"
}

# build_demo_engine NAME: int8, unless that costs accuracy or fails; then what went wrong shows, and fp32 is built.
build_demo_engine() {
  local paths=(--checkpoint "checkpoints/$1" --output "engines/$1" --overwrite)
  run build "${paths[@]}" --precision int8 || run build "${paths[@]}"
}

demo() {
  local architecture name
  server=
  trap '[ -n "$server" ] && kill -TERM "$server" 2>/dev/null && wait "$server"' EXIT
  for architecture in d x h; do
    name=nvlm-$architecture-tiny
    [ "engines/$name/manifest.json" -nt "checkpoints/$name/model.safetensors" ] || build_demo_engine "$name"
  done
  for architecture in d x h; do
    ask_served "engines/nvlm-$architecture-tiny" docs/images/receipt.png "What is the total?"
  done
}

case "${1:-demo}" in
  demo)
    install runtime
    demo
    ;;
  test)
    install test
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
    exec .venv/bin/python -m pytest "${@:2}"
    ;;
  *)
    install runtime
    exec .venv/bin/nvlm-trt "$@"
    ;;
esac
