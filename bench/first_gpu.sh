#!/usr/bin/env bash
# For whoever has a GPU for the first time: everything that could not be tried without one, in under 20 minutes.
#
#   bench/first_gpu.sh [FOLDER]      from a checkout, with tidali installed in the environment that `python` is of
#
# Checks the machine, runs tests/gpu, measures training on both routes, by CUDA graphs and with either decoder, the training step
# beside the original study's, and trains two rows of the study for a few epochs. The folder then holds a log and a record of each,
# and index.html, which shows them. A stage that fails or takes too long does not stop the others. Without a GPU it does the same,
# smaller.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-first-gpu-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
python=${PYTHON:-python}
tidali() { "$python" -m tidali "$@"; }
data=$out/data

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    classes=20 per_class=500 res=64,224 size=() repeats=3 scale=0.2 rows=1,7 graphs=reduce-overhead
else
    classes=4 per_class=40 res=32 size=(--batch-size 8) repeats=1 scale=0.07 rows=1 graphs=off
fi

# stage NAME SECONDS COMMAND...: its output goes to NAME.log, and a line of what became of it to stages.tsv
: > "$out/stages.tsv"
stage() {
    local name=$1 limit=$2 begun=$SECONDS code
    shift 2
    echo "first_gpu: $name"
    timeout --kill-after 10 "$limit" "$python" -m "$@" > "$out/$name.log" 2>&1
    code=$?
    printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - begun))" >> "$out/stages.tsv"
}

nvidia-smi > "$out/nvidia-smi.txt" 2>&1
tidali demo "$data" --classes "$classes" --per-class "$per_class" --overwrite > "$out/demo.log" 2>&1 || { cat "$out/demo.log"; exit 1; }
stage doctor 240 tidali doctor --data "$data" --out "$out"
stage train-cached 240 tidali bench train --data "$data" --res "$res" "${size[@]}" --repeats "$repeats" --cache device \
    --profile --json "$out/train-cached.json"
stage train-streamed 240 tidali bench train --data "$data" --res "$res" "${size[@]}" --repeats "$repeats" --cache off \
    --profile --json "$out/train-streamed.json"
stage train-graphs 150 tidali bench train --data "$data" --res "${res%%,*}" "${size[@]}" --repeats "$repeats" --cache device \
    --compile "$graphs" --profile --json "$out/train-graphs.json"
stage decoders 180 bench.decoders "$data" "$out" --repeats "$repeats" "${size[@]}"
stage step 120 tidali bench step --res "$res" "${size[@]}" --repeats "$repeats" --profile --json "$out/step.json"
stage study 120 tidali study --data "$data" --rows "$rows" --epochs-scale "$scale" --out "$out/study"
stage tests 480 pytest tests/gpu -q -p no:cacheprovider

"$python" -m bench.first_gpu "$out"
