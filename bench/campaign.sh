#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine that may have no network:
#
#     bash bench/campaign.sh OUT_DIR [--minutes 9] [--stages "LIST"] [--quick] [--tests "PATHS"]
#
# From a source checkout, with a Python (PYTHON=..., default python3) that has torch, triton and transformers, it
#   tests      runs the tests of kernels, models and steps (on the GPU, if there is one) and, at the same time, small cases
#              of every kernel under compute-sanitizer's memcheck, racecheck and initcheck, if it is installed
#   calibrate  times each kernel of a step of BERT-base beside its predicted time
#   race       times other configurations of the kernels, those with the largest expected gain first
#   ragged     times a whole training step against Transformers on ragged lengths
#   equal      the same on equal lengths, and under torch.compile when there is time to compile
#   kernels    times every operator against PyTorch and the peers that are installed
#   parity     trains `mini` for 300 steps beside Transformers in bf16 and float32, same weights, same batches
#   tune       derives attention's launch table by measurement and prints it, in the time that is left
# and writes to OUT_DIR:
#   campaign.json         the stages, their seconds and exit statuses; what could not run, with the reason
#   tests.log, tests.xml  the test-suite; tests.log also has the sanitizers' reports
#   bench.log             the output of the benchmarks, and tune's table
#   calibrate.json, race.json, ragged.json, equal.json, kernels.json, parity.json    their results, with the environment
# Each stage has a share of the time; what it leaves goes to those after it. calibrate, race and kernels write their results
# as they go. A stage that fails or runs out of time does not stop the next one; the exit status is then 1.
#
# --stages runs only these. Where a command may take ten minutes, three of them take all, each with at most seven files:
#     bash bench/campaign.sh OUT_1 --stages "tests calibrate"
#     bash bench/campaign.sh OUT_2 --stages "race ragged equal"
#     bash bench/campaign.sh OUT_3 --stages "kernels parity tune"
# --quick runs every stage as a smoke test, also on a CPU; --tests PATHS runs only these tests.
set -uo pipefail

fail() { echo "campaign: error: $*" >&2; exit 2; }

minutes=9 quick=0 out= tests="tests/gpu tests/kernels tests/model tests/train/step"
all="tests calibrate race ragged equal kernels parity tune" stages=
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) [ $# -gt 1 ] || fail "--minutes needs a number"; minutes=$2; shift ;;
    --tests) [ $# -gt 1 ] || fail "--tests needs paths"; tests=$2; shift ;;
    --stages) [ $# -gt 1 ] || fail "--stages needs names of stages"; stages=$2; shift ;;
    --quick) quick=1 ;;
    -*) fail "unknown option $1; see the head of $0" ;;
    *) [ -z "$out" ] || fail "one OUT_DIR, please; got $out and $1"; out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || fail "usage: bash bench/campaign.sh OUT_DIR [--minutes 9] [--stages LIST] [--quick] [--tests PATHS]"
for name in ${stages:=$all}; do
  case " $all " in *" $name "*) ;; *) fail "--stages: there is no stage $name; choose among $all" ;; esac
done
[[ $minutes =~ ^[0-9]+$ ]] && [ "$minutes" -ge 1 ] || fail "--minutes must be a whole number from 1; got $minutes"
mkdir -p "$out" || fail "cannot make $out"
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
[ -f "$root/setup.py" ] && [ -d "$root/tests" ] || fail "$root is not a source checkout: run the campaign.sh inside one"
cd "$root" || exit 2
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python here: set PYTHON"

began=$SECONDS
deadline=$((began + 60 * minutes))
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

names=() statuses=() durations=() gaps=()
gap() { echo "== gap: $1"; gaps+=("$1"); }
wanted() { case " $stages " in *" $1 "*) ;; *) return 1 ;; esac; }
# A stage's part of the time: its weight, over the weights of the stages that are left.
declare -A weights=([tests]=30 [calibrate]=16 [race]=10 [ragged]=12 [equal]=14 [kernels]=12 [parity]=10 [tune]=8)
# begin NAME: sets limit, the seconds that the stage may take; status 1 where it is not wanted.
begin() {
  local name left=$((deadline - SECONDS)) sum=0 seen=0
  wanted "$1" || return 1
  for name in $all; do
    [ "$name" != "$1" ] || seen=1
    if [ $seen = 1 ] && wanted "$name"; then sum=$((sum + ${weights[$name]})); fi
  done
  limit=$((left * ${weights[$1]} / sum))
}
# stage NAME LOG COMMAND...: run COMMAND for at most $limit seconds.
stage() {
  local name=$1 log=$2 start=$SECONDS status
  shift 2
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
# within SHARE: that share of $limit in minutes, for a benchmark's --minutes.
within() { "$python" -c "print(round(max(0.1, $limit / 60 * $1), 2))"; }
on_gpu=1
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || on_gpu=0
rm -f "$out"/{campaign,calibrate,race,kernels,parity,ragged,equal}.json "$out"/{tests,bench}.log "$out/tests.xml"

if begin tests; then
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
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT -k 15 "$limit" \
          "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
          "$python" -m fusebert.bench.sanitize >"$work/$tool.log" 2>&1
        echo "$? $((SECONDS - start))" >"$work/$tool.status"
      ) &
    done
  else
    gap "${tools[*]}: no compute-sanitizer here: it comes with NVIDIA's CUDA toolkit (package cuda-sanitizer)"
  fi
  # shellcheck disable=SC2086 # several paths
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} stage tests tests.log "$python" -m pytest "${pytest_options[@]}" $tests
  wait # nothing may run beside the benchmarks
  if [ -n "$sanitizer" ]; then
    for tool in "${tools[@]}"; do
      { echo "== $tool"; cat "$work/$tool.log"; } >>"$out/tests.log"
      read -r status seconds <"$work/$tool.status"
      names+=("$tool") statuses+=("$status") durations+=("$seconds")
      echo "== $tool: exit status $status after $seconds s; $(tail -n 1 "$work/$tool.log")"
    done
  fi
fi

# --minutes ends a benchmark before its part of the time is over.
bench=("$python" -m fusebert.bench.cli)
small=(--model tiny --tokens 256 --seqlen 64 --vocab-size 1024)
for name in calibrate race tune; do
  if wanted $name && [ $on_gpu = 0 ]; then gap "$name: there is no GPU to measure on"; fi
done
if [ $on_gpu = 1 ] && begin calibrate; then
  options=(--model base)
  [ "$quick" = 0 ] || options=("${small[@]}")
  stage calibrate bench.log \
    "${bench[@]}" calibrate "${options[@]}" --minutes "$(within 0.85)" --out "$out/calibrate.json"
fi
if [ $on_gpu = 1 ] && begin race; then
  stage race bench.log "${bench[@]}" tune --kernels rows --minutes "$(within 0.85)" --out "$out/race.json"
fi
if begin ragged; then
  options=(--seqlen 512 --minutes "$(within 0.64)")
  [ "$quick" = 0 ] || options=(--quick "${small[@]}")
  stage ragged bench.log "${bench[@]}" step --ragged "${options[@]}" --out "$out/ragged.json"
fi
if begin equal; then
  options=(--compile --minutes "$(within 0.6)")
  [ "$limit" -ge 100 ] || options[0]=--no-compile
  [ "$quick" = 0 ] || options=(--quick "${small[@]}")
  stage equal bench.log "${bench[@]}" step --equal "${options[@]}" --out "$out/equal.json"
fi
if begin kernels; then
  options=(--minutes "$(within 0.77)")
  [ "$quick" = 0 ] || options=(--quick)
  stage kernels bench.log "${bench[@]}" kernels "${options[@]}" --out "$out/kernels.json"
fi
if begin parity; then
  options=(--model mini --steps 300)
  [ "$quick" = 0 ] || options=(--steps 6 "${small[@]}")
  stage parity bench.log "${bench[@]}" parity "${options[@]}" --out "$out/parity.json"
fi
if [ $on_gpu = 1 ] && begin tune; then
  if [ "$quick" = 1 ]; then
    gap "tune: left out by --quick"
  elif [ "$limit" -lt 30 ]; then
    gap "tune: no time left"
  else
    stage tune bench.log "${bench[@]}" tune
    if [ "${statuses[-1]}" = 124 ] || [ "${statuses[-1]}" = 137 ]; then
      gap "tune: cut short; bench.log has the part of the table that was derived"
      last=$((${#names[@]} - 1))
      unset "names[$last]" "statuses[$last]" "durations[$last]"
    fi
  fi
fi

"$python" - "$out/campaign.json" "$((SECONDS - began))" "${names[*]}" "${statuses[*]}" "${durations[*]}" "${gaps[@]}" <<'END'
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
echo "---- campaign: $((SECONDS - began)) s; files in $out"
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
