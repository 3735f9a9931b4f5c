#!/usr/bin/env bash
# Make .venv ready, quickly where it already is: packaging/setup.sh [dev]
#
#   BACKEND=cpu|cuda|metal|vulkan   overrides what is detected
#   CMAKE_ARGS=...                  is used as given instead
#   PYTHON=...                      the Python to build on (3.11 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-}
venv=.venv
log=$venv/setup.log
os=$(uname -s)

say() { printf '%s\n' "$*" >&2; }
fail() {
  say "error: $1"
  shift
  for line in "$@"; do say "hint: $line"; done
  exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# how_to_install APT DNF PACMAN ZYPPER BREW: the command for this system
how_to_install() {
  local like=""
  # shellcheck disable=SC1091
  [ -r /etc/os-release ] && like=$(. /etc/os-release && printf '%s %s' "${ID:-}" "${ID_LIKE:-}")
  case "$os $like" in
    Darwin*) printf '%s' "$5" ;;
    *debian* | *ubuntu*) printf 'sudo apt install %s' "$1" ;;
    *fedora* | *rhel* | *centos*) printf 'sudo dnf install %s' "$2" ;;
    *arch*) printf 'sudo pacman -S %s' "$3" ;;
    *suse*) printf 'sudo zypper install %s' "$4" ;;
    *) printf 'install %s with your package manager' "$1" ;;
  esac
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" "$venv/bin/python" python3 python3.13 python3.12 python3.11 python3.14 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
}

# Sets backend (a word for people), CMAKE_ARGS and note. A toolkit without its device is no use: the library would not even load.
detect_backend() {
  note=""
  if [ -n "${CMAKE_ARGS:-}" ]; then
    backend="as CMAKE_ARGS says"
    return
  fi
  local nvcc="" gpu="" choice=${BACKEND:-}
  if have nvcc; then nvcc=$(command -v nvcc); elif [ -x /usr/local/cuda/bin/nvcc ]; then nvcc=/usr/local/cuda/bin/nvcc; fi
  if have nvidia-smi && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; fi
  if [ -n "$choice" ]; then
    :
  elif [ "$os $(uname -m)" = "Darwin arm64" ]; then
    choice=metal
  elif [ -n "$nvcc" ] && [ -n "$gpu" ]; then
    choice=cuda
  elif vulkan_sdk && ls /dev/dri/renderD* >/dev/null 2>&1; then
    choice=vulkan
  else
    choice=cpu
    if [ -n "$gpu" ]; then
      note="An NVIDIA GPU is here but no CUDA toolkit (nvcc): install it and run this again to use the GPU."
    elif [ -n "$nvcc" ]; then
      note="A CUDA toolkit is here but no NVIDIA GPU answers (nvidia-smi)."
    elif have hipcc && [ -e /dev/kfd ]; then
      note="ROCm is here: CMAKE_ARGS=-DGGML_HIP=on would use it; this script has not been tried with it."
    fi
  fi
  backend=$choice
  case $choice in
    cpu) if [ "$os" = Darwin ]; then CMAKE_ARGS=-DGGML_METAL=off; else CMAKE_ARGS=""; fi ;;
    cuda)
      [ -n "$nvcc" ] || fail "no CUDA toolkit (nvcc) here" "install it, or use BACKEND=cpu"
      export CUDACXX=${CUDACXX:-$nvcc}
      CMAKE_ARGS=-DGGML_CUDA=on
      ;;
    metal) CMAKE_ARGS=-DGGML_METAL=on ;;
    vulkan) CMAKE_ARGS=-DGGML_VULKAN=on ;;
    *) fail "BACKEND=$choice is unknown" "use cpu, cuda, metal or vulkan" ;;
  esac
  export CMAKE_ARGS
}

vulkan_sdk() {
  have glslc && { [ -n "${VULKAN_SDK:-}" ] || [ -r /usr/include/vulkan/vulkan.h ]; }
}

check_compiler() {
  local compiler
  if [ "$os" = Darwin ] && ! xcode-select -p >/dev/null 2>&1; then
    fail "no C++ compiler: llama.cpp is compiled for this machine" "xcode-select --install"
  fi
  for compiler in "${CXX:-}" c++ g++ clang++; do
    if [ -n "$compiler" ] && have "$compiler" && printf '#include <vector>\n' | "$compiler" -x c++ -fsyntax-only - 2>/dev/null; then
      return
    fi
  done
  fail "no working C++ compiler: llama.cpp is compiled for this machine" \
    "$(how_to_install build-essential gcc-c++ base-devel gcc-c++ 'xcode-select --install')"
}

# logged WHAT COMMAND...: the output goes to the log, a dot every ten seconds to the terminal
logged() {
  local what=$1 pid ticks=0
  shift
  printf '%s ' "$what" >&2
  # A process group of its own, so that an interrupt ends the compilers too.
  set -m
  "$@" >>"$log" 2>&1 9>&- </dev/null &
  pid=$!
  set +m
  # shellcheck disable=SC2064
  trap "kill -- -$pid 2>/dev/null || true; printf '\ninterrupted\n' >&2; exit 130" INT TERM
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.5
    ticks=$((ticks + 1))
    if [ $((ticks % 20)) = 0 ]; then printf '.' >&2; fi
  done
  trap - INT TERM
  if ! wait "$pid"; then
    say "failed"
    tail -n 25 "$log" >&2
    fail "$what: failed" "the whole log is $log" "without a network, or behind a proxy, see pip's messages above" \
      "if a GPU backend does not compile: BACKEND=cpu $0 ${extra}"
  fi
  say " done"
}

python=$(find_python)
[ -n "$python" ] || fail "no Python 3.11 or newer found" \
  "$(how_to_install python3 python3.12 python python312 'brew install python@3.12')" "or https://www.python.org/downloads" "or name one: PYTHON=/path/to/python3.12 $0"

# An open file description carries the lock until this script ends, however it ends.
exec 9>"$venv.lock"
if ! "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
  say "Another setup is running; waiting for it."
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
fi

detect_backend
llama=$(sed -n 's/.*"\(llama-cpp-python==[^"]*\)".*/\1/p' pyproject.toml)
build="$llama $backend $CMAKE_ARGS"
wanted="$(cksum <pyproject.toml) $build"

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
  rm -rf "$venv"
  if ! "$python" -m venv "$venv"; then
    rm -rf "$venv"
    fail "$python cannot make a virtual environment" "$(how_to_install python3-venv python3 python python3 'brew install python@3.12')"
  fi
fi

stamp=$venv/.localllm-setup${extra:+-$extra}
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] || [ "$(cat "$venv/.localllm-setup-dev" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

: >"$log"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install "$@"; }

built=$venv/.localllm-build
if [ "$(cat "$built" 2>/dev/null)" != "$build" ]; then
  check_compiler
  if [ -n "$note" ]; then say "$note"; fi
  options=(--force-reinstall --no-deps "$llama")
  # pip's cache does not know CMAKE_ARGS: read and write it for the plain build only.
  if [ -n "$CMAKE_ARGS" ]; then options=(--no-cache-dir --no-binary llama-cpp-python "${options[@]}"); fi
  rm -f "$built"
  logged "Compiling llama.cpp, backend: $backend (minutes, once)" pip "${options[@]}"
  printf '%s\n' "$build" >"$built"
fi
logged "Installing localllm${extra:+ and its $extra tools}" pip --editable ".${extra:+[$extra]}"
"$venv/bin/python" -c 'import llama_cpp' >>"$log" 2>&1 || fail "the compiled llama.cpp does not load" "see $log" "try BACKEND=cpu $0"
printf '%s\n' "$wanted" >"$stamp"
