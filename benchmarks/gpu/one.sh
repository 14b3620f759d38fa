#!/usr/bin/env bash
# Twelve minutes on a GPU host: what it is, values, profile, kernels, streams through Triton, a short sign-off.
# Each step has a limit of its own, writes as it goes, and never stops the next one.
#
#   benchmarks/gpu/one.sh [--preset 1.5b] [--device cuda|cpu] [--out DIR] [--quick]
#
# Without options: preset 1.5b on a GPU, tiny with --quick on a CPU; results in results/gpu/<gpu>/.
# DIR/steps.tsv lists the steps: name, exit code (124: it ran into its limit), seconds.
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
preset="" device="" out="" quick=""
while [ $# -gt 0 ]; do
  case $1 in
    --preset) preset=$2; shift 2 ;;
    --device) device=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --quick) quick=--quick; shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "one.sh: unknown option $1; see --help" >&2; exit 64 ;;
  esac
done
gpu=$("$python" -c 'from harness.host import nvml; print(next((g.name for g in nvml.visible()), ""))' 2>/dev/null | tail -1)
if [ -z "$device" ]; then [ -n "$gpu" ] && device=cuda || device=cpu; fi
if [ "$device" = cpu ]; then : "${preset:=tiny}"; quick=--quick; where=cpu; on=cpu; else : "${preset:=1.5b}"; where=$gpu; on=gpu; fi
[ -n "$out" ] || out=results/gpu/$(echo "$where" | tr 'A-Z ' 'a-z-')
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
: >"$out/steps.tsv"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

step() { # step NAME SECONDS COMMAND...: its output in NAME.log
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  echo "== $name (at most $limit s)"
  timeout -k 20 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - began)) >>"$out/steps.tsv"
  echo "   exit code $code after $((SECONDS - began)) s; last: $(tail -n 1 "$out/$name.log" | cut -c1-200)"
}

positions=1500,8000,63000
[ -n "$quick" ] && positions=400,1500
fused="--sessions 1,16,64,128 --check tiny:float32,$preset:bfloat16"
[ -n "$quick" ] && fused="--sessions 1,2 --contexts 20 --steps 2 --prompts 8 --check ''" # eager, in Triton's interpreter
step environment 60 "$python" benchmarks/gpu/environment.py --out "$out"
step kernels 90 "$python" benchmarks/model/kernels.py $quick
if "$python" -c 'import pytest' 2>/dev/null; then # on a GPU, compiled kernels and graphs against plain steps
  step values 60 "$python" -m pytest -q -p no:cacheprovider tests/vibevoice/test_ragged.py tests/vibevoice/test_fused_rows.py tests/vibevoice/test_cuda_graphs.py
fi
step check 150 "$python" benchmarks/model/precision.py --preset "$preset" --device "$device" --positions $positions --frames 8 --out "$out/check.json"
step profile 200 "$python" -m harness profile --preset "$preset" --device "$device" --out "$out" --budget-seconds "$([ -n "$quick" ] && echo 20 || echo 130)" $quick
step device 100 "$python" benchmarks/gpu/device.py --preset "$preset" --device "$device" --out "$out" $quick
step fused 120 "$python" benchmarks/gpu/fused.py --preset "$preset" --device "$device" --out "$out" $fused
step fused-streams 120 "$python" benchmarks/gpu/streams.py --preset "$preset" --device "$on" --topology fused --out "$out" $quick
step streams 170 "$python" benchmarks/gpu/streams.py --preset "$preset" --device "$on" --out "$out" $quick
if "$python" -c 'import locust' 2>/dev/null; then
  sed "s/PRESET/$preset/" benchmarks/gpu/plan.yaml >"$out/plan.yaml"
  step signoff 360 "$python" -m harness signoff "$out/plan.yaml" --results "$out/runs"
else
  printf 'signoff\tskipped: locust is not installed here\t0\n' >>"$out/steps.tsv"
fi
echo "== left in $out:"
(cd "$out" && find . -type f -printf '%s\t%p\n' | sort -k2)
cat "$out/steps.tsv"
! awk -F'\t' '$2 != 0 && $1 != "signoff" {bad = 1} END {exit !bad}' "$out/steps.tsv"
