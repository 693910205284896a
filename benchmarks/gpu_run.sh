#!/usr/bin/env bash
# One GPU session, in order of what matters: build, every test with sanitizers on small shapes beside it, every op against
# its peers and whole steps with kernels on and off, a training run; on request, the search for tiles.
# Usage: benchmarks/gpu_run.sh [--only OP] [--resume] [--out DIR] [STAGE...]   stages: build test sanitize bench train tune
# (default: all but tune, under 9 minutes on an H200 with 16 cores). --resume leaves out what has already ended well in
# DIR, so that a session that was cut short goes on where it ended; --only does test, sanitize, bench and tune of one op.
# Uses the `python3` of the environment as it is. Logs, rows as JSON and a copy of benchmarks/results, where each row is
# appended as soon as it is measured, are left in DIR ($OUT, or runs/gpu).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu} only='' resume='' stages=''
while [ $# -gt 0 ]; do
  case $1 in
    --only | --out) [ $# -gt 1 ] || { echo "gpu_run.sh: $1 needs a value" >&2 && exit 2; } ;;&
    --only) only=$2 && shift 2 ;;
    --out) out=$2 && shift 2 ;;
    --resume) resume=1 && shift ;;
    -h | --help) sed -n '2,9s/^# //p' "$0" && exit 0 ;;
    build | test | sanitize | bench | train | tune) stages+=" $1" && shift ;;
    *) echo "gpu_run.sh: unknown argument $1; see --help" >&2 && exit 2 ;;
  esac
done
stages=${stages:-build test sanitize bench train}
mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mapfile -t ops < <(cd benchmarks/ops && ls bench_*.py | sed 's/^bench_//; s/\.py$//' && echo step)
if [ -n "$only" ]; then
  case " ${ops[*]} " in *" $only "*) ops=("$only") ;; *) echo "gpu_run.sh: no op $only in ${ops[*]}" >&2 && exit 2 ;; esac
fi
failed=0

wanted() { case " $stages " in *" $1 "*) ;; *) false ;; esac }

stage() { # name, seconds at most, command...: run it if asked for, keep its log, show its end; stdout is "$to", if set
  local name=$1 most=$2 started=$SECONDS status=0
  shift 2
  wanted "${name%%-*}" || return 0
  if [ -n "$resume" ] && [ -e "$out/$name.done" ]; then echo "== $name: done before" && return 0; fi
  rm -f "$out/$name.done"
  if [ -n "${to:-}" ]; then
    timeout "$most" "$@" 2>"$out/$name.log" >"$to" || status=$?
  else
    timeout "$most" "$@" >"$out/$name.log" 2>&1 || status=$?
  fi
  echo "== $name: exit $status after $((SECONDS - started)) s"
  tail -n 12 "$out/$name.log"
  if [ "$status" = 0 ]; then touch "$out/$name.done"; else failed=1; fi
  return "$status"
}

# All four tools at once: they are slow for what they do on the host, and leave the GPU idle.
sanitize() {
  local tool status=0
  for tool in memcheck racecheck synccheck initcheck; do
    stage "sanitize-$tool" 200 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m benchmarks.bench ${only:+"$only"} --quick --check --device cuda &
  done
  for tool in memcheck racecheck synccheck initcheck; do wait -n || status=1; done
  return "$status"
}

stage build 180 python3 setup.py build_ext --inplace
wanted sanitize && { sanitize & sanitizing=$!; }

parallel=()
python3 -c 'import xdist' 2>/dev/null && parallel=(-n 10 --dist loadfile) # a file's tests share what they compile
tests=(tests)
[ -z "$only" ] || mapfile -t tests < <(ls -d tests/ops/test_"$only".py tests/cpp/test_"$only"_*.py 2>/dev/null)
[ ${#tests[@]} = 0 ] ||
  stage test 240 python3 -m pytest -q --maxfail=30 -p no:cacheprovider "${parallel[@]}" "${tests[@]}"
wanted sanitize && { wait "$sanitizing" || failed=1; } # before anything is timed

for op in "${ops[@]}"; do
  to=$out/bench-$op.json stage "bench-$op" 120 python3 -m benchmarks.bench "$op" --device cuda --json
done
[ -n "$only" ] || stage train 60 python3 -m pgolf demo --run "$out/demo" --data "$out/stdlib" --set max_seconds=20
tunable=(leaky_relu2_mlp softcapped_cross_entropy int6_linear slot optim)
[ -z "$only" ] || mapfile -t tunable < <(printf '%s\n' "${tunable[@]}" | grep -x "$only")
for op in "${tunable[@]}"; do stage "tune-$op" 300 python3 -m benchmarks.tune "$op" --write; done
case ${only:-newton_schulz} in newton_schulz) stage tune-newton_schulz 300 python3 -m benchmarks.tune_newton_schulz --write ;; esac
cp -r benchmarks/results "$out/" 2>/dev/null
exit "$failed"
