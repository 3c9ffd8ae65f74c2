#!/usr/bin/env bash
# Everything on a GPU machine, without network: build what is missing, check, measure, report. Needs torch, triton, numpy
# and pytest; most tests run several at a time where pytest-xdist is; where matplotlib is missing there are no pictures.
#
#     benchmarks/gpu.sh            all three of these, in half an hour
#     benchmarks/gpu.sh figures    the kernels' own tests, then the suites
#     benchmarks/gpu.sh checks     all other device tests, compute-sanitizer
#     benchmarks/gpu.sh triton     these of Triton, which has some 2000 kernels to compile for them; torch.compile's tests
#
# What matters most comes first. A step that fails doesn't stop the others; the exit status is that of the worst. The
# suites go on where they stopped. All that the steps say, and at the end how each went, is added to gpu.log.
#
#     RESULTS=folder    where the results go (benchmarks/results)
#     DEVICE=cpu        a rehearsal
#     BUDGET=100        per cent of the suites' time
#     LIMIT=530         seconds after which nothing is begun and what runs is interrupted, and 20 later killed, for
#                       machines that end a command themselves (none)
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

step() { # step NAME SECONDS COMMAND…: runs the command for at most so long, and notes how it went
  local start=$SECONDS outcome=ok seconds=$2
  [ $((limit - SECONDS)) -lt "$seconds" ] && seconds=$((limit - SECONDS))
  printf '\n== %s (%d s)\n' "$1" "$SECONDS" | tee -a "$log"
  if [ "$seconds" -lt 10 ]; then
    outcome="left out: no time" status=1
  else
    # Interrupted, pytest still says what failed.
    # A process left behind holds tee's end of a pipe open: nothing waits for tee.
    timeout --signal=INT --kill-after=20 "$seconds" "${@:3}" > >(tee -a "$log") 2>&1 ||
      { outcome="failed ($?; 124, 137: out of time)"; status=1; }
  fi
  summary+=("$(printf '%-24s %4d s  %s' "$1" $((SECONDS - start)) "$outcome")")
}
suite() { # suite NAME SECONDS OPTIONS…: no new cell after so long, and an end in any case half a minute later
  local seconds=$(($2 * budget / 100))
  step "$1 suite" $((seconds + 30)) "$python" -m benchmarks.run --suite "$1" --device "$device" --results "$results" \
    --budget "$seconds" "${@:3}"
}
tests() { # tests NAME SECONDS OPTIONS…
  step "$1" "$2" "$python" -m pytest -q --tb=short --maxfail=400 --disable-warnings "${@:3}"
}
many_tests() { # many_tests PROCESSES NAME SECONDS OPTIONS…: so many at a time; each computes its fp64 oracles on the CPU
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
  # Without the caching allocator an access beyond a buffer's end is one beyond an allocation's.
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
# By name: auto would go on without a library that cannot be built, and all below would measure another backend.
ls "${libraries[@]}" >/dev/null 2>&1 ||
  MIXOUT_FAST_BUILD=$device step "build" 240 "$python" setup.py -q build_ext --inplace
# Of this torch alone, and so perhaps missing where the others were brought along. All works without, at a greater cost to
# the host.
if ! "$python" -c "import sys; from mixout_fast.backends import operators; sys.exit(operators.AUTOGRAD_ERROR)"; then
  MIXOUT_FAST_BUILD=autograd step "build for autograd" 90 "$python" setup.py -q build_ext --inplace
  status=0
fi
step "backends" 60 "$python" -c "from mixout_fast import __main__, backends
__main__.main([])
backends.select('$device', '$device')  # raises where it cannot serve"
[ $status = 0 ] || finish

if [ "$part" = figures ] || [ "$part" = all ]; then
  tests "kernel tests" 60 tests/test_cuda_kernels.py
  # To compile a form takes far longer than to time it: few cells, and what compiles last.
  compiled=(--contenders published compiled compiled-dropout)
  compiled_model=(--modes compile --precisions bf16)
  if [ "$device" != cpu ]; then
    compiled+=(--shapes 4096x1024x1024 4096x1024x4096 --dtypes bf16 --p 0.9)
    compiled_model+=(--models bert-large-4-layers)
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
    # The backend's own kernels: PyTorch's would take most of the time.
    sanitizer "$tool" cuda --kernel-name kns=mixout_fast
  done
  # Here PyTorch's too: what they write is initialised.
  sanitizer initcheck cuda
fi
if [ "$part" = triton ] || [ "$part" = all ]; then
  many_tests "$processors" "device tests of Triton" 270 tests -m "not slow" -k "$device and triton"
  # Inductor has as many processes of its own as there are processors.
  TORCHINDUCTOR_COMPILE_THREADS=1 many_tests $(((processors + 1) / 2)) "torch.compile tests" 90 tests -m slow -k "$device"
  # Once without, so that the kernels are compiled.
  [ "$device" = cpu ] || step "for the sanitizer" 70 "$python" -m benchmarks.sanitized triton
  sanitizer memcheck triton
fi

finish
