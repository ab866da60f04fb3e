#!/usr/bin/env bash
# From nothing to a fine-tuned model: environment, model, LoRA fine-tuning, answers before and after.
#   scripts/quickstart.sh [--name NAME] [--author AUTHOR] [--run FOLDER]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" ""
exec python scripts/quickstart.py "$@"
