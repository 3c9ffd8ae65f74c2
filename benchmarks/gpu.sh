#!/usr/bin/env bash
# Runs everything on a GPU machine, without network: builds what is missing, checks, measures, reports. Needs torch,
# triton, numpy and pytest. With pytest-xdist most tests run in parallel; without matplotlib there are no pictures.
#
#     benchmarks/gpu.sh            all three parts, in half an hour
#     benchmarks/gpu.sh figures    the tests of the CUDA kernels, then the suites
#     benchmarks/gpu.sh checks     the device tests except Triton's, compute-sanitizer
#     benchmarks/gpu.sh triton     the same for Triton, which must compile some 2000 kernels; torch.compile's tests
#
# The most important steps come first. A failed step doesn't stop the others, except if the build fails or the backend
# cannot serve the device; the exit status is 1 if a step failed. Suites resume where they stopped. The steps' output
# and, at the end, how each step went are appended to gpu.log.
#
#     RESULTS=folder    where the results go (benchmarks/results)
#     DEVICE=cpu        a rehearsal without a GPU
#     BUDGET=100        the suites' time in per cent
#     LIMIT=530         seconds after which no step starts and the running one is interrupted, and killed 20 seconds
#                       later, for machines that limit a command's time (none)
set -uo pipefail
cd "$(dirname "$0")/.."

part=${1:-all}
case $part in figures | checks | triton | all) ;;
*) echo "gpu.sh: $part; it takes figures, checks or triton" >&2 && exit 2 ;;
esac
results=${RESULTS:-benchmarks/results}
device=${DEVICE:-cuda}
budget=${BUDGET:-100}
limit=${LIMIT:-86400}
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=10
mkdir -p "$results"
log="$results/gpu.log"
summary=()
status=0

step() { # step NAME SECONDS COMMAND…: runs the command for at most SECONDS, and notes how it went
  local start=$SECONDS outcome=ok seconds=$2
  code=0
  [ $((limit - SECONDS)) -lt "$seconds" ] && seconds=$((limit - SECONDS))
  printf '\n== %s (%d s)\n' "$1" "$SECONDS" | tee -a "$log"
  if [ "$seconds" -lt 10 ]; then
    outcome="left out: no time" status=1
  else
    # When interrupted, pytest still says what failed.
    # A process left behind keeps the pipe to tee open, so nothing waits for tee.
    timeout --signal=INT --kill-after=20 "$seconds" "${@:3}" > >(tee -a "$log") 2>&1 || code=$?
    [ $code = 0 ] || { outcome="failed ($code; 124, 137: out of time)"; status=1; }
  fi
  summary+=("$(printf '%-24s %4d s  %s' "$1" $((SECONDS - start)) "$outcome")")
}
suite() { # suite NAME SECONDS OPTIONS…: starts no cell after SECONDS · budget / 100, and ends 30 s later in any case
  local try end=$((SECONDS + $2 * budget / 100))
  for try in 1 2; do
    step "$1 suite" $((end - SECONDS + 30)) "$python" -m benchmarks.run --suite "$1" --device "$device" \
      --results "$results" --budget $((end - SECONDS)) "${@:3}"
    [ $code = 3 ] || break # a cell left CUDA unusable: once more, with the other cells first
  done
}
tests() { # tests NAME SECONDS OPTIONS…
  step "$1" "$2" "$python" -m pytest -q --tb=short --maxfail=400 --disable-warnings "${@:3}"
}
many_tests() { # many_tests PROCESSES NAME SECONDS OPTIONS…: in PROCESSES, which compute their fp64 oracles on the CPU
  if "$python" -c "import xdist" 2>/dev/null; then
    OMP_NUM_THREADS=$(((processors + $1 - 1) / $1)) tests "${@:2}" -n "$1"
  else
    tests "${@:2}"
  fi
}
sanitizer() { # sanitizer TOOL BACKEND OPTIONS…
  if [ "$device" = cpu ] || ! command -v compute-sanitizer >/dev/null; then
    summary+=("$(printf '%-24s         left out: there is no compute-sanitizer' "$1, $2")")
    return
  fi
  # Without the caching allocator each buffer is an allocation of its own, so the sanitizer sees accesses past its end.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1, $2" 90 compute-sanitizer --tool "$1" --error-exitcode 9 "${@:3}" \
    "$python" -m benchmarks.sanitized "$2"
}

finish() { # how each step went
  printf '%s\n' "" "${summary[@]}" | tee -a "$log"
  exit $status
}

printf '\n==== %s, %s\n' "$part" "$(date -u +%FT%TZ)" >>"$log"
processors=$(($(nproc) > 16 ? 16 : $(nproc)))
libraries=(mixout_fast/_C.so)
[ "$device" = cpu ] || libraries+=(mixout_fast/_CUDA.so)
for library in "${libraries[@]}"; do
  if [ ! -e "$library" ] || [ -n "$(find csrc setup.py -newer "$library" -print -quit)" ]; then
    # Not auto: it would go on without a library that cannot be built, and everything below would measure another.
    MIXOUT_FAST_BUILD=$device step "build" 240 "$python" setup.py -q build_ext --inplace
    [ $status = 0 ] && touch "${libraries[@]}"
    break
  fi
done
# The autograd library serves this version of torch only, so it may be missing where the others were copied here.
# Everything works without it, but takes more of the host's time.
if ! "$python" -c "import sys; from mixout_fast.backends import operators; sys.exit(operators.AUTOGRAD_ERROR)"; then
  built=$status
  MIXOUT_FAST_BUILD=autograd step "build for autograd" 90 "$python" setup.py -q build_ext --inplace
  status=$built
fi
step "backends" 60 "$python" -c "import torch
from mixout_fast import __main__, backends
torch.empty(1, device='$device')  # raises where there is no such device
__main__.main([])
backends.select('$device', '$device')  # raises where it cannot serve"
[ $status = 0 ] || finish

if [ "$part" = figures ] || [ "$part" = all ]; then
  many_tests 4 "kernel tests" 60 tests/test_cuda_kernels.py
  # Compiling a contender takes far longer than timing it: few cells are compiled, and these suites come last.
  compiled=(--contenders published compiled compiled-dropout)
  compiled_model=(--modes compile --precisions bf16)
  if [ "$device" != cpu ]; then
    compiled+=(--shapes 4096x1024x1024 4096x1024x4096 --dtypes bf16 --p 0.9)
    compiled_model+=(--models bert-large-4-layers --p 0.9)
  fi
  suite layer 130
  suite model 70 --modes eager
  suite paths 60
  suite terms 15
  suite memory 30
  suite layer 30 "${compiled[@]}"
  suite model 50 "${compiled_model[@]}"
  step "report" 60 "$python" -m benchmarks.report --results "$results"
fi
if [ "$part" = checks ] || [ "$part" = all ]; then
  many_tests $(((processors + 1) / 2)) "device tests" 170 tests -m "not slow" -k "$device and not triton"
  for tool in memcheck racecheck synccheck; do
    # Only the backend's own kernels: PyTorch's would take most of the time.
    sanitizer "$tool" cuda --kernel-name kns=mixout_fast
  done
  # PyTorch's kernels too: initcheck must see the memory that they initialise.
  sanitizer initcheck cuda
fi
if [ "$part" = triton ] || [ "$part" = all ]; then
  many_tests "$processors" "device tests of Triton" 270 tests -m "not slow" -k "$device and triton"
  # By default Inductor starts as many compile processes as there are processors.
  TORCHINDUCTOR_COMPILE_THREADS=1 many_tests $(((processors + 1) / 2)) "torch.compile tests" 90 tests -m slow -k "$device"
  # Once without the sanitizer, so that the kernels are compiled.
  [ "$device" = cpu ] || step "for the sanitizer" 120 "$python" -m benchmarks.sanitized triton
  sanitizer memcheck triton
fi

finish
