#!/usr/bin/env bash
# Sets up .venv, then:  ./build.sh          builds an engine of each tiny model, serves it and asks it about an image
#                       ./build.sh test     runs lint, types, the layers of imports and every test
#                       ./build.sh COMMAND  runs any nvlm-trt command, for example: ./build.sh ask --help
#
# Takes the first of $PYTHON, python3, python3.12, python3.11 and python3.10 that is Python 3.10, 3.11 or 3.12. Without
# any, gets a Python 3.12 into .uv/ with uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {
  echo "error: $*" >&2
  exit 2
}

# fits PYTHON: whether this is a Python that tritonserver's wheel can serve with.
fits() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

# find_python: prints a Python 3.10, 3.11 or 3.12.
find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.10; do
    if fits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fetch_python || fail "no Python 3.10, 3.11 or 3.12 on PATH, and uv cannot get one (see .uv/log); install Python 3.12" \
    "or set PYTHON=/path/to/python3.12"
}

# fetch_python: prints a Python 3.12 that uv puts into .uv/. Installs uv there unless it is on PATH.
fetch_python() {
  local uv=uv
  export UV_PYTHON_INSTALL_DIR=$PWD/.uv/python
  mkdir -p .uv
  echo "No Python 3.10, 3.11 or 3.12 on PATH: getting 3.12 into .uv/ with uv ..." >&2
  if ! command -v uv >/dev/null; then
    uv=.uv/tool/bin/uv
    [ -x "$uv" ] ||
      { "${PYTHON:-python3}" -m venv .uv/tool && .uv/tool/bin/python -m pip install --quiet uv; } >.uv/log 2>&1 ||
      return 1
  fi
  "$uv" python install --no-bin 3.12 >.uv/log 2>&1 &&
    "$uv" python find --managed-python --no-project 3.12 2>>.uv/log
}

# pip_install LOG ARGUMENT...: installs quietly, and shows pip's messages if it fails.
pip_install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${@:2}" >"$1" 2>&1 || {
    cat "$1" >&2
    return 1
  }
}

# install SET: brings .venv to the exact versions of a set, runtime or test, unless they are there already.
install() {
  local list=requirements/$1.txt stamp log=.venv/pip.log version
  if [ ! -x .venv/bin/python ]; then
    local python
    python=$(find_python)
    "$python" -m venv .venv ||
      fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [ -e "requirements/runtime-$version.txt" ]; then
    [ "$1" = runtime ] || fail "the tests need Python 3.11 or 3.12; remove .venv and set PYTHON=/path/to/python3"
    list=requirements/runtime-$version.txt
  fi
  stamp=.venv/installed-$1-$(cat "$list" pyproject.toml | sha256sum | cut -c1-16)
  [ -e "$stamp" ] && return
  echo "Installing $list into .venv ..." >&2
  pip_install "$log" -r "$list" || fail "pip could not install $list; see its messages above"
  pip_install "$log" --no-deps --editable . || fail "pip could not install nvlm-trt itself; see its messages above"
  touch "$stamp"
}

# run COMMAND ...: shows an nvlm-trt command as a user would type it, then runs it.
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

# ask_over_http URL MODEL IMAGE QUESTION: asks an OpenAI endpoint with curl, or with Python where there is no curl.
ask_over_http() {
  local url=$1/chat/completions model=$2 image=$3 question=$4 body
  body='{"model": "'$model'", "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,'$(base64 <"$image" | tr -d '\n')'"}},
    {"type": "text", "text": "\n'$question'"}]}]}'
  if command -v curl >/dev/null; then
    printf "\n$ curl -H 'Content-Type: application/json' -d @question.json %s\n" "$url" >&2
    curl --silent --show-error --fail --noproxy '*' --header 'Content-Type: application/json' --data @- "$url" <<<"$body"
  else
    echo "POST $url (there is no curl here)" >&2
    .venv/bin/python -c 'import sys, urllib.request as r
request = r.Request(sys.argv[1], sys.stdin.buffer.read(), {"Content-Type": "application/json"})
print(r.build_opener(r.ProxyHandler({})).open(request).read().decode(), end="")' "$url" <<<"$body"
  fi
  echo
}

# ask_served ENGINE IMAGE QUESTION: serves an engine, asks it one question over gRPC and the same over HTTP, and stops
# the server.
ask_served() {
  local engine=$1 image=$2 question=$3 log address= ports=(--grpc-port 0 --http-port 0 --metrics-port 0 --openai-port 0)
  log=$(mktemp)
  printf '\n$ ./build.sh serve %s %s\n' "$engine" "${ports[*]}" >&2
  .venv/bin/nvlm-trt serve "$engine" "${ports[@]}" >"$log" &
  server=$!
  until address=$(grep -om1 'grpc://[^ ]*' "$log"); do
    kill -0 "$server" 2>/dev/null || fail "the server did not start; see its message above"
    sleep 0.1
  done
  echo "serving at $address" >&2
  run ask "$question" --image "$image" --url "$address" --stats
  ask_over_http "$(grep -om1 'http://[^ ]*/v1' "$log")" "$(basename "$engine")" "$image" "$question"
  kill -TERM "$server"
  wait "$server"
  server=
  rm -f "$log"
}

# build_demo_engine NAME: builds it in int8. If that fails or costs accuracy, shows the message and builds fp32.
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

# check_types: runs mypy on the product, on the tests with looser options, and on each of the files that share a name.
check_types() {
  local code file tests loose=(--no-warn-unused-ignores)
  # tests pass wrong and partial values on purpose, and replace parts of modules
  for code in arg-type assignment attr-defined call-overload func-returns-value index list-item misc operator \
    union-attr var-annotated; do
    loose+=(--disable-error-code "$code")
  done
  # mypy reads nothing from a cache that other options wrote, so each set of options has its own
  .venv/bin/mypy --cache-dir .mypy_cache/loose "${loose[@]}" tests &
  tests=$!
  .venv/bin/mypy
  for file in triton_repo/*/1/model.py $(find tests -mindepth 2 -name conftest.py); do
    .venv/bin/mypy "$file"
  done
  wait "$tests"
}

# check_code: runs lint, layers and types, the quickest first.
check_code() {
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
  .venv/bin/lint-imports --no-logo
  check_types
}

# test_everything PYTEST-OPTION...: checks the code, then runs the tests in one worker per core, up to four.
# pytest's summary is the last line.
test_everything() {
  local cores workers
  check_code
  cores=$(nproc)
  workers=$((cores < 4 ? cores : 4))
  exec .venv/bin/python -m pytest -n "$workers" --dist loadgroup --no-loadscope-reorder "$@"
}

case "${1:-demo}" in
  demo)
    install runtime
    demo
    ;;
  test)
    install test
    test_everything "${@:2}"
    ;;
  *)
    install runtime
    exec .venv/bin/nvlm-trt "$@"
    ;;
esac
