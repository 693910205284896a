#!/usr/bin/env bash
# One GPU session, in order of what matters: build, every test, the sanitizers, then every op against its peers.
# Usage: benchmarks/gpu_run.sh [OUT_DIR] [STAGE...]     stages: build test sanitize bench train (default: all)
# Uses the `python3` of the environment as it is and writes logs to OUT_DIR and rows to benchmarks/results/.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
shift || true
stages=${*:-build test sanitize bench train}
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
stage test python3 -m pytest -q -x --maxfail=30 -p no:cacheprovider tests
for tool in memcheck racecheck; do
  stage "sanitize-$tool" timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
    python3 -m pytest -q -p no:cacheprovider tests/ops -k "cuda and not benchmark"
done
stage bench python3 -m benchmarks.bench --device cuda
stage train python3 -m pgolf demo --run "$out/demo" --data "$out/stdlib" --set max_seconds=60
cp -r benchmarks/results "$out/" 2>/dev/null
exit "$failed"
