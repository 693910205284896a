#!/usr/bin/env bash
# One GPU session, in order of what matters: build, every test, every op against its peers, a training run, tile tables,
# sanitizers. An H200 with 16 cores takes about 10 minutes for all but the sanitizers, which take as long as they get.
# Usage: benchmarks/gpu_run.sh [OUT_DIR] [STAGE...]     stages: build test bench train tune sanitize (default: all)
# Uses the `python3` of the environment as it is and writes logs to OUT_DIR and rows to benchmarks/results/.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
shift || true
stages=${*:-build test bench train tune sanitize}
mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/python PYTHONUNBUFFERED=1
failed=0

stage() { # name, command...: run it if asked for, keep its log, show its end
  local name=$1
  shift
  case " $stages " in *" ${name%%-*} "*) ;; *) return ;; esac
  local started=$SECONDS status=0
  "$@" >"$out/$name.log" 2>&1 || status=$?
  echo "== $name: exit $status after $((SECONDS - started)) s"
  tail -n "${LINES_SHOWN:-15}" "$out/$name.log"
  [ "$status" = 0 ] || failed=1
}

stage build python3 setup.py build_ext --inplace
stage test python3 -m pytest -q --maxfail=30 -p no:cacheprovider tests
stage bench python3 -m benchmarks.bench --device cuda
stage train python3 -m pgolf demo --run "$out/demo" --data "$out/stdlib" --set max_seconds=60
stage tune-tiles python3 -m benchmarks.tune
stage tune-newton-schulz python3 -m benchmarks.tune_newton_schulz
for tool in memcheck racecheck; do
  stage "sanitize-$tool" timeout "${SANITIZE_SECONDS:-600}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    python3 -m pytest -q -p no:cacheprovider -k cuda tests/cpp/test_slot_cuda.py tests/ops
done
cp -r benchmarks/results "$out/" 2>/dev/null
exit "$failed"
