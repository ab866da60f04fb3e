# Sourced by the other scripts: makes .venv with ftlit and the extras in $1 (such as dev,peers), once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
python="${FTLIT_PYTHON:-python3}"
venv="${FTLIT_VENV:-.venv}"
stamp="$venv/.ftlit-$(cat pyproject.toml scripts/constraints.txt | cksum | cut -d' ' -f1)-${extras//,/-}"

if [ ! -e "$stamp" ]; then
  echo "making $venv (${extras:-no extras})"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" - <<'PY' || { echo "ftlit needs Python 3.11 or newer; set FTLIT_PYTHON to one." >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
  torch="$(grep '^torch==' scripts/constraints.txt)"
  if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    # Without an NVIDIA GPU take torch's CPU build: a tenth of the download.
    if command -v nvidia-smi >/dev/null 2>&1; then
      pip install "$torch"
    else
      pip install --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null \
        || { echo "torch's CPU index does not answer; taking the default build"; pip install "$torch"; }
    fi
  fi
  pip install -c scripts/constraints.txt -e ".${extras:+[$extras]}"
  touch "$stamp"
fi
export PATH="$PWD/$venv/bin:$PATH"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
