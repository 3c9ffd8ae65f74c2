#!/usr/bin/env bash
# Everything on a GPU machine in about ten minutes, without network: build what is missing, device tests, sanitizer, all
# suites, report. Needs torch, triton, numpy and pytest; where matplotlib is missing there are no pictures.
# A step that fails doesn't stop the others; the exit status is that of the worst. Run again it goes on where it stopped.
#
#     RESULTS=folder    where the results go (benchmarks/results)
#     DEVICE=cpu        a rehearsal
#     BUDGET=100        per cent of the suites' time
set -uo pipefail
cd "$(dirname "$0")/.."

results=${RESULTS:-benchmarks/results}
device=${DEVICE:-cuda}
budget=${BUDGET:-100}
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
mkdir -p "$results"
log="$results/gpu.log"
: >"$log"
status=0

step() { # step NAME SECONDS COMMAND…: runs the command for at most so long, and notes how it went
  local start=$SECONDS outcome=ok
  printf '\n== %s (%d s)\n' "$1" "$SECONDS"
  timeout "$2" "${@:3}" || { outcome="failed ($?; 124: out of time)"; status=1; }
  printf '%-28s %4d s  %s\n' "$1" $((SECONDS - start)) "$outcome" >>"$log"
}
suite() { # suite NAME SECONDS: no new cell after so long, and an end in any case half a minute later
  local seconds=$(($2 * budget / 100))
  step "$1 suite" $((seconds + 30)) "$python" -m benchmarks.run --suite "$1" --device "$device" --results "$results" \
    --budget "$seconds"
}

libraries=(mixout_fast/_C.so)
[ "$device" = cpu ] || libraries+=(mixout_fast/_CUDA.so)
ls "${libraries[@]}" >/dev/null 2>&1 || step "build" 240 "$python" setup.py -q build_ext --inplace
step "backends" 60 "$python" -m mixout_fast
step "device tests" 180 "$python" -m pytest tests -q -m "not slow" -k "$device"
if command -v compute-sanitizer >/dev/null && [ "$device" = cuda ]; then
  # Without the caching allocator an access beyond a buffer's end is one beyond an allocation's.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.sanitized
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  echo "sanitizer: left out, there is no compute-sanitizer" | tee -a "$log"
fi
suite layer 150
suite terms 20
suite model 90
suite memory 45
step "report" 60 "$python" -m benchmarks.report --results "$results"

printf '\n'
cat "$log"
exit $status
