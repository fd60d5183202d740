#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine that may have no network:
#
#     bash bench/campaign.sh OUT_DIR [--minutes 9] [--quick] [--tests PATH]
#
# From a source checkout, with a Python (PYTHON=..., default python3) that has torch, triton and transformers, it
#   tests    runs the test-suite (on the GPU, if there is one) and, at the same time, small cases of every kernel under
#            compute-sanitizer's memcheck, racecheck and initcheck, if it is installed
#   kernels  times every operator against PyTorch and the peers that are installed
#   parity   trains `mini` for 300 steps beside Transformers in bf16 and float32, same weights, same batches
#   ragged   times a whole training step against Transformers on ragged lengths
#   equal    the same on equal lengths, and under torch.compile when there is time to compile
#   tune     derives attention's launch table by measurement and prints it, in the time that is left
# and writes eight files to OUT_DIR:
#   campaign.json         the stages, their seconds and exit statuses; what could not run, with the reason
#   tests.log, tests.xml  the test-suite; tests.log also has the sanitizers' reports
#   bench.log             the output of the benchmarks, and tune's table
#   kernels.json, parity.json, ragged.json, equal.json    their results, with the environment
# A stage that fails or runs out of time does not stop the next one; the exit status is then 1.
#
# --quick runs every stage as a smoke test, also on a CPU; --tests PATH runs only these tests.
set -uo pipefail

fail() { echo "campaign: error: $*" >&2; exit 2; }

minutes=9 quick=0 tests=tests out=
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) [ $# -gt 1 ] || fail "--minutes needs a number"; minutes=$2; shift ;;
    --tests) [ $# -gt 1 ] || fail "--tests needs a path"; tests=$2; shift ;;
    --quick) quick=1 ;;
    -*) fail "unknown option $1; see the head of $0" ;;
    *) [ -z "$out" ] || fail "one OUT_DIR, please; got $out and $1"; out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || fail "usage: bash bench/campaign.sh OUT_DIR [--minutes 9] [--quick] [--tests PATH]"
[[ $minutes =~ ^[0-9]+$ ]] && [ "$minutes" -ge 1 ] || fail "--minutes must be a whole number from 1; got $minutes"
mkdir -p "$out" || fail "cannot make $out"
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
[ -f "$root/setup.py" ] && [ -d "$root/tests" ] || fail "$root is not a source checkout: run the campaign.sh inside one"
cd "$root" || exit 2
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python here: set PYTHON"

begin=$SECONDS
deadline=$((begin + 60 * minutes))
work=$(mktemp -d) || fail "cannot make a temporary folder"
trap 'rm -rf "$work"' EXIT

# Keep the repository root off sys.path: its kernels/ hides Hugging Face's package of that name. Unset the variables that
# replace a GPU by the interpreter. Unbuffered output survives when a stage is cut short.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export HYPOTHESIS_STORAGE_DIRECTORY="$work/hypothesis"
export FUSEBERT_CAMPAIGN=1 # the campaign's own test then does not start another campaign
unset TRITON_INTERPRET FUSEBERT_BACKEND
FUSEBERT_COMMIT=${FUSEBERT_COMMIT:-$(git describe --always --dirty --abbrev=12 2>/dev/null || true)}
export FUSEBERT_COMMIT

# Install from a copy, so that the checkout gets no build/ and no egg-info. A venv does not work: if $python is in one,
# --system-site-packages shows the packages of the base interpreter.
mkdir "$work/source" "$work/site"
cp -r setup.py pyproject.toml README.md LICENSE kernels model train bench "$work/source/"
if ! "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile --no-cache-dir \
  --disable-pip-version-check --root-user-action ignore --target "$work/site" "$work/source" >"$work/pip.log" 2>&1; then
  echo "pip could not install the sources; they are put on the path as they are. The end of pip's output:"
  tail -n 3 "$work/pip.log"
  rm -rf "${work:?}/site" && mkdir -p "$work/site/fusebert"
  cp -r kernels model train bench "$work/site/fusebert/"
fi
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PATH="$work/site/bin:$PATH"

where=$("$python" -c 'import fusebert.bench as b; print(b.__file__)') || fail "fusebert cannot be imported with $python"
case $where in "$work"/*) ;; *) echo "note: measuring the fusebert at $where, not this checkout" ;; esac
"$python" -m fusebert.bench.environment || fail "the environment cannot be read: is torch installed for $python?"
nvidia-smi 2>/dev/null || echo "no nvidia-smi here: no NVIDIA GPU"

whole=$((60 * minutes))
names=() statuses=() durations=() gaps=()
gap() { echo "== gap: $1"; gaps+=("$1"); }
# stage NAME PERCENT LOG COMMAND...: run COMMAND for at most PERCENT of the whole time, and of what is left of it.
stage() {
  local name=$1 limit=$((whole * $2 / 100)) log=$3 left=$((deadline - SECONDS)) start=$SECONDS status
  shift 3
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 10 ]; then
    echo "== $name: no time left"
    status=124
  else
    echo "== $name: at most $limit s"
    echo "== $name" >>"$out/$log"
    timeout -s INT -k 15 "$limit" "$@" >>"$out/$log" 2>&1
    status=$?
  fi
  names+=("$name") statuses+=("$status") durations+=($((SECONDS - start)))
  echo "== $name: exit status $status after $((SECONDS - start)) s"
}
has() { "$python" -c "import $1" 2>/dev/null; }
share() { "$python" -c "print(round(max(0.1, $1), 2))"; }
rm -f "$out"/{campaign,kernels,parity,ragged,equal}.json "$out"/{tests,bench}.log "$out/tests.xml"

pytest_options=(-q --junitxml "$out/tests.xml" -p no:cacheprovider --durations 10)
# Most of the time goes into compiling kernels, on the CPU. At most 8: each process holds a context on the GPU.
cores=$(nproc)
if has xdist; then pytest_options+=(-n $((cores > 8 ? 8 : cores)) --dist loadfile); fi
if has pytest_timeout; then pytest_options+=(--timeout 150); fi
# The sanitizers slow a program down many times. They run beside the tests, where nothing is timed.
tools=(memcheck racecheck initcheck)
sanitizer=$(command -v compute-sanitizer || ls -d "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer \
  /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [ -n "$sanitizer" ]; then
  for tool in "${tools[@]}"; do
    (
      start=$SECONDS
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT -k 15 $((whole * 40 / 100)) \
        "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
        "$python" -m fusebert.bench.sanitize >"$work/$tool.log" 2>&1
      echo "$? $((SECONDS - start))" >"$work/$tool.status"
    ) &
  done
else
  gap "${tools[*]}: no compute-sanitizer here: it comes with NVIDIA's CUDA toolkit (package cuda-sanitizer)"
fi
OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} stage tests 34 tests.log "$python" -m pytest "${pytest_options[@]}" "$tests"
wait # nothing may run beside the benchmarks
if [ -n "$sanitizer" ]; then
  for tool in "${tools[@]}"; do
    { echo "== $tool"; cat "$work/$tool.log"; } >>"$out/tests.log"
    read -r status seconds <"$work/$tool.status"
    names+=("$tool") statuses+=("$status") durations+=("$seconds")
    echo "== $tool: exit status $status after $seconds s; $(tail -n 1 "$work/$tool.log")"
  done
fi

# --minutes ends a benchmark before its share is over; the last stage gets the time that the others leave.
bench=("$python" -m fusebert.bench.cli)
if [ "$quick" = 1 ]; then
  small=(--model tiny --tokens 256 --seqlen 64 --vocab-size 1024)
  stage kernels 26 bench.log "${bench[@]}" kernels --quick --out "$out/kernels.json"
  stage parity 18 bench.log "${bench[@]}" parity --steps 6 "${small[@]}" --out "$out/parity.json"
  stage ragged 14 bench.log "${bench[@]}" step --quick --ragged "${small[@]}" --out "$out/ragged.json"
  stage equal 100 bench.log "${bench[@]}" step --quick --equal "${small[@]}" --out "$out/equal.json"
else
  stage kernels 26 bench.log "${bench[@]}" kernels --minutes "$(share "$minutes * 0.2")" --out "$out/kernels.json"
  stage parity 18 bench.log "${bench[@]}" parity --model mini --steps 300 --out "$out/parity.json"
  stage ragged 14 bench.log \
    "${bench[@]}" step --ragged --seqlen 512 --minutes "$(share "$minutes * 0.09")" --out "$out/ragged.json"
  left=$((deadline - SECONDS - 15))
  compile=--compile
  [ "$left" -ge 100 ] || compile=--no-compile
  stage equal 100 bench.log \
    "${bench[@]}" step --equal $compile --minutes "$(share "$left / 60 * 0.6")" --out "$out/equal.json"
fi
if [ "$quick" = 1 ]; then
  gap "tune: left out by --quick"
elif ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  gap "tune: there is no GPU to measure on"
elif [ $((deadline - SECONDS)) -lt 30 ]; then
  gap "tune: no time left"
else
  stage tune 100 bench.log "${bench[@]}" tune
  if [ "${statuses[-1]}" = 124 ] || [ "${statuses[-1]}" = 137 ]; then
    gap "tune: cut short; bench.log has the part of the table that was derived"
    last=$((${#names[@]} - 1))
    unset "names[$last]" "statuses[$last]" "durations[$last]"
  fi
fi

"$python" - "$out/campaign.json" "$((SECONDS - begin))" "${names[*]}" "${statuses[*]}" "${durations[*]}" "${gaps[@]}" <<'END'
import json, os, sys
path, total, names, statuses, durations, *gaps = sys.argv[1:]
stages = [
    {"stage": name, "exit_status": int(status), "seconds": int(seconds)}
    for name, status, seconds in zip(names.split(), statuses.split(), durations.split())
]
with open(path + ".tmp", "w") as file:
    commit = os.environ["FUSEBERT_COMMIT"] or None
    json.dump({"commit": commit, "seconds": int(total), "stages": stages, "gaps": gaps}, file, indent=1)
os.replace(path + ".tmp", path)
END

# The summary comes last, for terminals that show only the end of the output.
for log in tests bench; do
  echo "---- the end of $log.log"
  tail -n $([ $log = tests ] && echo 30 || echo 90) "$out/$log.log" 2>/dev/null
done
echo "---- campaign: $((SECONDS - begin)) s; files in $out"
for each in "${gaps[@]}"; do echo "not run: $each"; done
failed=0
for i in "${!names[@]}"; do
  case ${statuses[$i]} in
    0) result=passed ;;
    124 | 137) result="OUT OF TIME"; failed=1 ;;
    *) result="FAILED (${statuses[$i]})"; failed=1 ;;
  esac
  echo "${names[$i]}: $result, ${durations[$i]} s"
done
exit $failed
