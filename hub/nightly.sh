#!/usr/bin/env bash
# Nightly refresh of a recommender: mine, train, evaluate, gate, encode, index. For cron, or one task of Airflow.
#
#   LOG=log.parquet ITEMS=items.parquet BASE=models/base STATE=/data/refresh SPLIT_TIME=2026-11-20 hub/nightly.sh
#
# Each night has a folder of its own in STATE; STATE/current is a link to the newest one that passed the gate, with
# run/model, vectors and index in it. It changes at once, and only after all of the night is there. A stage that is done is
# not done again: after a fault, start the script again with the same NIGHT. Exit codes: 0 refreshed, 4 the gate refused,
# anything else as the command that failed.
#
#   LOG, ITEMS     the log and the item table; BASE: the model that the first night starts from, later ones from current
#   SPLIT_TIME     pairs from this time on measure the model, those before train it
#   CONFIG         of training/run.py (default training/configs/one_gpu_lora.yaml)
#   OPTIONS        more of its options (default --merge_adapter true: what is encoded is a whole model, not an adapter)
#   METRIC, LOSS   the gate (default recall@10, 0.01): refused if the new model's METRIC, by all that it reads, is more than
#                  LOSS below the current model's on the same queries
#   NIGHT          name of the night (default: today's date, UTC); PYTHON: the interpreter (default python)
set -euo pipefail
cd "$(dirname "$0")/.."
: "${LOG:?the log}" "${ITEMS:?the item table}" "${BASE:?the first model}" "${STATE:?a folder for the nights}" "${SPLIT_TIME:?}"
CONFIG=${CONFIG:-training/configs/one_gpu_lora.yaml} OPTIONS=${OPTIONS---merge_adapter true}
METRIC=${METRIC:-recall@10} LOSS=${LOSS:-0.01} PYTHON=${PYTHON:-python}
mkdir -p "$STATE"
STATE=$(cd "$STATE" && pwd)
night=$STATE/${NIGHT:-$(date -u +%F)} current=$STATE/current
mkdir -p "$night"
exec 9>"$STATE/.nightly.lock"
flock -n 9 || { echo "nightly.sh: another refresh is running in $STATE" >&2; exit 1; }

stage() { # stage RESULT COMMAND...: run the command unless its result is there; 3 is done with rejects
    local result=$1 code=0
    shift
    [ -e "$result" ] && return
    "$PYTHON" "$@" || code=$?
    [ "$code" = 0 ] || [ "$code" = 3 ] || exit "$code"
}

model=$BASE compared=()
if [ -e "$current" ]; then
    model=$current/run/model compared=(--compare "$current/run/model")
fi
stage "$night/test.parquet" training/mine.py --interactions "$LOG" --split_time "$SPLIT_TIME" \
    --output "$night/train.parquet" --test_output "$night/test.parquet"
# shellcheck disable=SC2086  # OPTIONS are several words
stage "$night/run/metrics.json" training/run.py "$CONFIG" --model "$model" --items "$ITEMS" \
    --train_pairs "$night/train.parquet" --eval_pairs "$night/test.parquet" --output_dir "$night/run" $OPTIONS
stage "$night/evaluation/evaluation.json" training/evaluate.py --model "$night/run/model" "${compared[@]}" \
    --items "$ITEMS" --pairs "$night/test.parquet" --output "$night/evaluation"
"$PYTHON" - "$night/evaluation/evaluation.json" "$METRIC" "$LOSS" <<'GATE'
import json
import sys

path, metric, loss = sys.argv[1], sys.argv[2], float(sys.argv[3])
with open(path, encoding="utf-8") as stream:
    together = json.load(stream)["together"]
if together is None:
    print("Gate: passed, there is no model to compare with.")
    sys.exit(0)
measured = together["models"][1]["difference"]["published"][metric]
shown = f"{metric} {measured['value']:.4f}, current {measured['other']:.4f}, at most {loss} below is allowed"
refused = measured["difference"] < -loss
print(f"Gate: {'refused' if refused else 'passed'}, {shown}.")
sys.exit(4 if refused else 0)
GATE
stage "$night/vectors/manifest.json" hub/encode.py --model "$night/run/model" --items "$ITEMS" --output "$night/vectors"
stage "$night/index/index.json" hub/index.py --embeddings "$night/vectors" --items "$ITEMS" --output "$night/index"
ln -sfn "$night" "$current.new"
mv -T "$current.new" "$current" # a rename: readers see the old night or the new one
echo "Refreshed: $current is $night"
