#!/usr/bin/env bash
# Runs every test binary of the bundle, then the demo, on this host's GPUs. Logs go to logs/.
# A test that finds no GPU fails instead of being skipped, unless EP_GPU is set to something else.
# Usage: run-tests.sh [NAME...]   only the binaries whose names contain one of these
set -uo pipefail
cd "$(dirname "$0")"

export EP_GPU="${EP_GPU-require}"
limit="${EP_TEST_TIMEOUT:-540}" # seconds for one binary
passed=0
failed=0
failures=()
mkdir -p logs

wanted() {
  [ $# -eq 1 ] && return 0
  local name="$1" part
  shift
  for part in "$@"; do
    [[ "$name" == *"$part"* ]] && return 0
  done
  return 1
}

fail() {
  failures+=("$1")
  echo "FAILED $1: logs/$1.log ends with"
  tail -n 20 "logs/$1.log" | sed 's/^/    /'
}

# Runs a test binary under a name.
run() {
  local name="$1" status ok bad
  # One at a time: tests that share GPUs disturb each other's bounded waits.
  timeout --kill-after=10 "$limit" "$2" --test-threads=1 >"logs/$name.log" 2>&1
  status=$?
  read -r ok bad < <(awk '/^test result:/ { ok += $4; bad += $6 } END { print ok + 0, bad + 0 }' \
    "logs/$name.log")
  # A binary that died did not count the test it died in.
  [ $status -ne 0 ] && [ "$bad" -eq 0 ] && bad=1
  passed=$((passed + ok))
  failed=$((failed + bad))
  if [ "$bad" -eq 0 ]; then
    echo "ok     $name ($ok)"
  else
    fail "$name"
  fi
}

for binary in tests/*; do
  name="$(basename "$binary")"
  if wanted "$name" "$@"; then run "$name" "$binary"; fi
done

gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')"
# Groups of four where there are fewer GPUs: ranks take turns, which takes milliseconds an operation.
if [ "$gpus" -gt 0 ] && [ "$gpus" -lt 4 ] && wanted ep.gpu-shared "$@"; then
  EP_GPU_RANKS_EACH=$(((3 + gpus) / gpus)) EP_GPU_ITERS="${EP_GPU_ITERS-300}" \
    run ep.gpu-shared tests/ep.gpu
fi

ranks="$((gpus > 0 ? gpus : 4))"
# Otherwise a host without GPUs runs the demo on the simulator.
backend=auto
[ "${EP_GPU:-}" = require ] && backend=cuda
for dtype in bf16 fp8; do
  name="demo-$dtype"
  wanted "$name" "$@" || continue
  timeout --kill-after=10 "$limit" bin/ep run --ranks "$ranks" --experts "$((16 * ranks))" \
    --backend "$backend" --dtype "$dtype" --json >"logs/$name.log" 2>&1
  if [ $? -eq 0 ] && tail -n 1 "logs/$name.log" | grep -q '"verified":true'; then
    passed=$((passed + 1))
    echo "ok     $name: $(tail -n 1 "logs/$name.log")"
  else
    failed=$((failed + 1))
    fail "$name"
  fi
done

[ ${#failures[@]} -gt 0 ] && printf 'failed: %s\n' "${failures[*]}"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
