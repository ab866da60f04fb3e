#!/usr/bin/env bash
# Sets up an environment and passes the tests: lint, types, all tests that need no network and no GPU.
# Arguments go to pytest, for example: scripts/test.sh tests/peft -k LoRA; -n 0 runs one test at a time.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" dev,peers
export HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
exec python -m pytest -n 2 --dist loadgroup "$@"
