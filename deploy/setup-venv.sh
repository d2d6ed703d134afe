#!/usr/bin/env bash
# Make .venv in the repository root and install psdiff into it; called by the Makefile.
#
#   deploy/setup-venv.sh base   what psdiff run and psdiff demo need: no PyTorch
#   deploy/setup-venv.sh dev    everything: training, export, tests, checkers
#   deploy/setup-venv.sh rtsp   the Debian packages behind the RTSP tests; goes on without them
#   deploy/setup-venv.sh triton .venv-triton with a tritonserver for the tests; goes on without it
#
# PYTHON names the interpreter (3.11 or newer). pip reads its own variables: on a machine without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes the dev install about 4 GB smaller.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PYTRITON=0.7.0 # tritonserver 2.51
RTSP_PACKAGES=(
  gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-base gstreamer1.0-plugins-good
  gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly gstreamer1.0-rtsp
)

fail() {
  echo "error: $*" >&2
  exit 1
}

# Run a command as root without asking for a password; fails where that cannot be done.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  else
    sudo -n "$@"
  fi
}

can_be_root() {
  [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null
}

# A fresh machine may not have package lists yet: fetch them when the first try fails.
apt_install() {
  local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@")
  as_root "${install[@]}" || { as_root apt-get update -q && as_root "${install[@]}"; }
}

check_python() {
  command -v "$PYTHON" >/dev/null || fail "python must be 3.11 or newer, got none called $PYTHON"
  local version
  version=$("$PYTHON" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "python must be 3.11 or newer, got $version from $PYTHON; choose another with PYTHON=python3.12"
}

# Debian and Ubuntu keep the part of venv that installs pip in a package of its own.
ensure_venv_module() {
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null && return
  local package
  package=$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  command -v apt-get >/dev/null || fail "$PYTHON must have the modules venv and ensurepip; install them first"
  can_be_root || fail "$PYTHON must have the module venv; run: sudo apt-get install -y $package"
  apt_install "$package"
}

make_venv() {
  [ -x "$1/bin/pip" ] && return
  check_python
  ensure_venv_module
  "$PYTHON" -m venv "$1"
}

install_psdiff() {
  make_venv .venv
  .venv/bin/python -m pip install --disable-pip-version-check --quiet --editable "$1"
}

install_rtsp_packages() {
  local missing=()
  if ! command -v apt-get >/dev/null; then
    echo "note: no apt-get here; the RTSP tests skip where GStreamer's RTSP server is missing"
    return
  fi
  for package in "${RTSP_PACKAGES[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  if [ ${#missing[@]} = 0 ]; then
    return
  fi
  if can_be_root && apt_install "${missing[@]}"; then
    return
  fi
  echo "note: the RTSP tests will skip; to run them: sudo apt-get install -y ${missing[*]}"
}

# The wheel of pytriton holds the server itself. Its Python backend was compiled before NumPy 2, so that the server has
# an environment of its own; the backend looks for the stub of its Python version beside itself.
install_triton_server() {
  local pip=(.venv-triton/bin/python -m pip install --disable-pip-version-check --quiet)
  local server version
  make_venv .venv-triton
  if ! { "${pip[@]}" --editable . 'numpy<2' && "${pip[@]}" --no-deps "nvidia-pytriton==$PYTRITON"; }; then
    echo "note: the Triton tests will skip: no wheel of nvidia-pytriton $PYTRITON for this machine"
    return
  fi
  server=$(echo .venv-triton/lib/python3.*/site-packages/pytriton/tritonserver)
  version=$(.venv-triton/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if ! cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$server/backends/python/"; then
    echo "note: the Triton tests will skip: nvidia-pytriton $PYTRITON has no Python backend for Python $version"
  fi
}

case "${1:-}" in
  base) install_psdiff . ;;
  dev) install_psdiff '.[dev]' ;;
  rtsp) install_rtsp_packages ;;
  triton) install_triton_server ;;
  *) fail "argument must be base, dev, rtsp or triton, got '${1:-}'" ;;
esac
