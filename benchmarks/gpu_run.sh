#!/usr/bin/env bash
# One GPU session, in order of what matters: build, every test, sanitizers on small shapes, every op against its peers
# and whole steps with kernels on and off, a training run; on request, the search for tiles.
# Usage: benchmarks/gpu_run.sh [--only OP] [--out DIR] [STAGE...]    stages: build test sanitize bench train tune
# (default: all but tune, under 9 minutes on an H200 with 16 cores). --only repeats test, sanitize and bench of one op,
# so that a session that was cut short goes on where it ended. Uses the `python3` of the environment as it is, writes
# logs to DIR (runs/gpu) and rows to benchmarks/results/.
set -uo pipefail
cd "$(dirname "$0")/.."
out=runs/gpu only='' stages=''
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=$2 && shift 2 ;;
    --out) out=$2 && shift 2 ;;
    build | test | sanitize | bench | train | tune) stages+=" $1" && shift ;;
    *) echo "gpu_run.sh: unknown argument $1; see the head of this file" >&2 && exit 2 ;;
  esac
done
stages=${stages:-build test sanitize bench train}
mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0

stage() { # name, seconds at most, command...: run it if asked for, keep its log, show its end
  local name=$1 most=$2 started=$SECONDS status=0
  shift 2
  case " $stages " in *" ${name%%-*} "*) ;; *) return ;; esac
  timeout "$most" "$@" >"$out/$name.log" 2>&1 || status=$?
  echo "== $name: exit $status after $((SECONDS - started)) s"
  tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
  [ "$status" = 0 ] || failed=1
}

parallel=()
python3 -c 'import xdist' 2>/dev/null && parallel=(-n 6)
tests=(tests)
[ -z "$only" ] || mapfile -t tests < <(ls -d tests/ops/test_"$only".py tests/cpp/test_"$only"_*.py 2>/dev/null)

stage build 180 python3 setup.py build_ext --inplace
stage test 240 python3 -m pytest -q --maxfail=30 -p no:cacheprovider "${parallel[@]}" "${tests[@]}"

# All four tools at once: they are slow for what they do on the host, and leave the GPU idle.
sanitize() {
  local tool
  for tool in memcheck racecheck synccheck initcheck; do
    (stage "sanitize-$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m benchmarks.bench ${only:+"$only"} --quick --check --device cuda) >"$out/sanitize-$tool.end" &
  done
  wait
  for tool in memcheck racecheck synccheck initcheck; do
    cat "$out/sanitize-$tool.end"
    grep -q 'exit 0 ' "$out/sanitize-$tool.end" || failed=1
  done
}
case " $stages " in *" sanitize "*) sanitize ;; esac

mapfile -t ops < <(python3 -c 'from benchmarks.bench import available_ops; print(*available_ops(), sep="\n")')
[ -z "$only" ] || ops=("$only")
for op in "${ops[@]}"; do stage "bench-$op" 120 python3 -m benchmarks.bench "$op" --device cuda; done
[ -n "$only" ] || stage train 60 python3 -m pgolf demo --run "$out/demo" --data "$out/stdlib" --set max_seconds=20
stage tune-tiles 300 python3 -m benchmarks.tune ${only:+"$only"} --write
stage tune-newton-schulz 300 python3 -m benchmarks.tune_newton_schulz
cp -r benchmarks/results "$out/" 2>/dev/null
exit "$failed"
