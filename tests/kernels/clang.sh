#!/usr/bin/env bash
# Compiles the extension with Clang, in a separate environment on top of .venv, and runs the tests of the kernels with it.
# Without Clang, installs that of Debian, which needs root. Takes four minutes.
#
#     clang.sh [folder for the environment]
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-build/clang}

find_clang() { compgen -c clang++ | grep -E '^clang\+\+(-[0-9]+)?$' | sort -V | tail -1 || true; }
if [ -z "$(find_clang)" ]; then
  timeout 300 sh -c "apt-get -qq update && apt-get -qq install --yes --no-install-recommends clang libomp-dev" > /dev/null || true
fi
clang=$(find_clang)
if [ -z "$clang" ]; then
  echo "clang.sh: no Clang here, and none that could be installed; nothing is tested" >&2
  exit 0
fi
"$clang" --version | head -1

.venv/bin/python -m venv --clear --without-pip "$folder"
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
own=$(packages "$folder/bin/python")
packages .venv/bin/python > "$own/environment.pth" # without the hook of the editable installation
CXX=$clang CC=${clang/++/} .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --target "$own" --config-settings build-dir="$folder/objects" .
"$folder/bin/python" -c 'from batchnorm import _native; assert "Clang" in _native.build["compiler"], _native.build'
"$folder/bin/python" -m pytest -q -p no:cacheprovider tests/kernels -k "not sanitize and (native or fast_path or plain)"
