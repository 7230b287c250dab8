#!/usr/bin/env bash
# Fifteen minutes on a machine with a CUDA device, and torch, Triton, pytest, hypothesis and numpy; nothing is installed.
#
#     OUT=folder benchmarks/card.sh [--dry]
#
# The steps are in the order of what matters. Each ends when its time is over. What it prints and writes is in $OUT as it
# comes, so nothing is lost when the whole is cut off. summary.txt has a line for each step: name, exit status, seconds.
# --dry runs small sizes of everything on the CPU, with Triton's interpreter, to find what can be wrong before.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-card-results}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CI=1
python=${PYTHON:-python}
total=${CARD_SECONDS:-840}
dry=${1:-}
[ -z "$dry" ] || [ "$dry" = --dry ] || { echo "usage: OUT=folder benchmarks/card.sh [--dry]" >&2; exit 2; }
[ -z "$dry" ] || export TRITON_INTERPRET=1
failed=0
quiet="-p no:cacheprovider --show-capture=no -W default" # a warning that only a card gives is no failure

# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=$2 begin=$SECONDS left=$((total - SECONDS)) status
    shift 2
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "$name not begun" | tee -a "$out/summary.txt"
        failed=1
        return
    fi
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    echo "$name $status $((SECONDS - begin))" | tee -a "$out/summary.txt"
    [ "$status" = 0 ] || failed=1
}

if [ -n "$dry" ]; then
    step kernels 60 "$python" benchmarks/card.py kernels --dry
    step tests 60 "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_triton.py -k zero_and_one
    step bench 150 "$python" benchmarks/card.py bench --dry --output "$out/cuda.json"
    step family 60 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_random_bits.py -k takes_a_new_key
    step train 60 "$python" benchmarks/card.py train --dry
else
    step kernels 60 "$python" benchmarks/card.py kernels
    step tests 60 "$python" -m pytest -v $quiet -k "not new_rate" tests/test_cuda.py
    step rates 120 "$python" -m pytest -v $quiet -k new_rate tests/test_cuda.py
    step bench 300 "$python" benchmarks/card.py bench --output "$out/cuda.json"
    step family 150 "$python" -m pytest -q $quiet -k cuda -m "not slow" \
        tests/ops tests/test_family.py
    step train 90 "$python" benchmarks/card.py train
    step compiled 600 "$python" -m pytest -v $quiet -k cuda tests/core/test_compiled.py
fi
exit $failed
