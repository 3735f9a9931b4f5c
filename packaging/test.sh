#!/usr/bin/env bash
# All checks of a checkout: sets it up (the first time), then lint, types, import rules, tests.
#
#   packaging/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packaging/setup.sh dev
PATH=$PWD/.venv/bin:$PATH
failed=""

check() {
  printf '== %s\n' "$*"
  "$@" || failed="$failed $1"
}

check ruff check .
check ruff format --check .
check pyright
check lint-imports
# as many processes as cores; a file stays in one of them, for what its tests share
check pytest -n auto --dist loadfile "$@"

if [ -n "$failed" ]; then
  printf 'failed:%s\n' "$failed" >&2
  exit 1
fi
