#!/usr/bin/env bash
# Searches at random for what the property tests do not hold for: ROUNDS times (default 20), each with another seed.
# What it finds becomes an @example of the test, so that the daily run, which always draws the same, has it too.
# Arguments after the number go to pytest, for example: scripts/property_search.sh 100 tests/models
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" dev,peers
export HF_HUB_OFFLINE=1
rounds=20
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then rounds="$1"; shift; fi
failed=()
for round in $(seq "$rounds"); do
  seed=$((RANDOM * 32768 + RANDOM))
  echo "round $round of $rounds: --hypothesis-seed=$seed"
  python -m pytest -q -m hypothesis -n 2 --dist loadgroup --hypothesis-profile=search --hypothesis-seed="$seed" "$@" \
    || failed+=("$seed")
done
[ "${#failed[@]}" -eq 0 ] || { echo "seeds that found something: ${failed[*]}"; exit 1; }
