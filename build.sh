#!/usr/bin/env bash
# Sets up .venv, then:  ./build.sh          build the tiny engines, serve them and ask each about a picture
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

# install SET...: bring .venv to the pinned requirements of the named sets, unless it is there already.
install() {
  local lists=() set stamp
  for set in "$@"; do lists+=("requirements/$set.txt"); done
  stamp=".venv/installed-$1-$(cat "${lists[@]}" pyproject.toml | sha256sum | cut -c1-16)"
  [ -e "$stamp" ] && return
  if [ ! -x .venv/bin/python ]; then
    local python
    python=$(find_python)
    "$python" -m venv .venv ||
      fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  echo "Installing the pinned $1 requirements into .venv ..." >&2
  local list
  for list in "${lists[@]}"; do
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$list" ||
      fail "pip could not install $list; see its message above"
  done
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . ||
    fail "pip could not install nvlm-trt itself; see its message above"
  touch "$stamp"
}

case "${1:-demo}" in
  demo)
    install runtime
    exec .venv/bin/nvlm-trt demo "${@:2}"
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
