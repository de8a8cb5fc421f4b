#!/usr/bin/env bash
# Makes .venv on first use, installs what this machine's accelerator needs, then runs a module.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

modules() {  # what can be run: the programs here and in tools/ and benchmarks/
  grep -ls '^if __name__ == ' -- *.py tools/*.py tools/*/__main__.py benchmarks/*.py umd/serve/*.py \
    | sed -e 's|/__main__||' -e 's|\.py$||' -e 's|/|.|g' || true
}

usage() {
  cat <<TEXT
Usage: bash run.sh MODULE [ARGUMENTS]   run a program, as python -m MODULE ARGUMENTS
       bash run.sh test [ARGUMENTS]     run the tests; arguments go to pytest
       bash run.sh demo [ARGUMENTS]     serve a page to try a model on: umd.serve.demo
       bash run.sh fit [ARGUMENTS]      whether a run fits, and how fast: tools.fit

Modules: $(modules | xargs)

The first call makes .venv with Python >= 3.11 (UMD_PYTHON chooses one) and installs
requirements.txt for the accelerator it finds; UMD_ACCELERATOR=cpu|cuda|tpu overrides that.
The first demo installs requirements-demo.txt, the first fit the TPU's compiler. Later calls start
at once, until those change.

Example: bash run.sh train --config configs/quickstart.py --workdir runs/quickstart
TEXT
}

accelerator() {
  if [[ -n "${UMD_ACCELERATOR:-}" ]]; then
    echo "$UMD_ACCELERATOR"
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo cuda
  elif [[ -e /dev/accel0 || -e /dev/vfio/0 ]]; then
    echo tpu
  else
    echo cpu
  fi
}

find_python() {
  local candidate
  for candidate in "${UMD_PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [[ -n "$candidate" ]] && command -v "$candidate" >/dev/null \
      && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11, 3.12 or 3.13 found. Install one, or set UMD_PYTHON to its path." >&2
  exit 1
}

lock() {  # Several processes of one launch may share this folder: one installs, the others wait.
  local waited=0
  until mkdir .venv.lock 2>/dev/null; do
    if [[ ! -w . ]]; then
      echo "error: cannot write in $PWD, so nothing can be installed here." >&2
      exit 1
    elif ((waited == 0)); then
      echo "Waiting for another process that installs into .venv" >&2
    elif ((waited >= 1800)); then
      echo "error: waited half an hour for .venv.lock. If nothing installs, remove that folder." >&2
      exit 1
    fi
    sleep 2
    waited=$((waited + 2))
  done
  trap 'rmdir .venv.lock' EXIT
  trap 'exit 130' INT TERM
}

unlock() {
  rmdir .venv.lock
  trap - EXIT INT TERM
}

installed() {
  [[ "$(cat .venv/installed 2>/dev/null)" == "$1" ]]
}

install() {
  local kind="$1" want python extra=()
  case "$kind" in
    cpu) ;;
    cuda) extra=("jax[cuda12]") ;;
    tpu) extra=("jax[tpu]") ;;
    *) echo "error: UMD_ACCELERATOR=$kind is not cpu, cuda or tpu." >&2; exit 1 ;;
  esac
  want="$kind $(cksum < requirements.txt)"
  if installed "$want"; then
    return
  fi
  python="$(find_python)"
  lock
  if ! installed "$want"; then
    echo "Installing for $kind into .venv (once; a minute or more)" >&2
    # Remade if it is broken or from another Python, kept otherwise: pip changes what it must.
    .venv/bin/python -c 'import pip' 2>/dev/null || "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
      -r requirements.txt ${extra[@]+"${extra[@]}"} >&2
    echo "$want" > .venv/installed
  fi
  unlock
}

install_demo() {
  local want
  want="$(cksum < requirements-demo.txt)"
  if [[ "$(cat .venv/installed_demo 2>/dev/null)" == "$want" ]]; then
    return
  fi
  lock
  echo "Installing what the demo needs into .venv (once)" >&2
  # With the others, so that their ranges hold for what both need.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r requirements.txt -r requirements-demo.txt >&2
  echo "$want" > .venv/installed_demo
  unlock
}

install_fit() {
  local want
  want="$(cksum < requirements-fit.txt)"
  if [[ "$(cat .venv/installed_fit 2>/dev/null)" == "$want" ]]; then
    return
  fi
  lock
  echo "Installing the TPU's compiler into .venv/libtpu (once; 200 MB)" >&2
  # Beside the packages: among them, every start of JAX would look for a TPU with it.
  rm -rf .venv/libtpu
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    --target .venv/libtpu -r requirements-fit.txt >&2
  echo "$want" > .venv/installed_fit
  unlock
}

case "${1:-}" in
  "" | -h | --help | help) usage; exit 0 ;;
esac
module="$1"
shift
if [[ "$module" == demo ]]; then
  module=umd.serve.demo
elif [[ "$module" == fit ]]; then
  module=tools.fit
fi
if [[ "$module" != test ]] && ! modules | grep -qxF -- "$module"; then
  echo "error: no module '$module' here." >&2
  usage >&2
  exit 2
fi
install "$(accelerator)"
if [[ "$module" == umd.serve.demo ]]; then
  install_demo
elif [[ "$module" == tools.fit && "$(accelerator)" != tpu ]]; then
  install_fit
fi
if [[ "$module" == test ]]; then
  exec .venv/bin/python -m pytest "$@"
fi
exec .venv/bin/python -m "$module" "$@"
