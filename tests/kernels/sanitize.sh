#!/usr/bin/env bash
# The kernels under AddressSanitizer with UndefinedBehaviorSanitizer, for each instruction set that this machine has, and
# under ThreadSanitizer, with threads instead of OpenMP, whose synchronisation it does not see.
#
#     sanitize.sh [folder for the programs] [problems]
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-build/sanitize}
problems=${2:-4000}
mkdir -p "$folder"

flags=(-std=c++20 -O1 -g -ffp-contract=off -Wall -Wextra -Wno-psabi)
memory=(-fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all)
threads=(-pthread -DBATCHNORM_PTHREADS -fsanitize=thread)

# build NAME ISA OPTIONS...: the program `NAME`.
build() {
  local name=$1 isa=$2
  shift 2
  "${CXX:-c++}" "${flags[@]}" -DBATCHNORM_ISA="$isa" "$@" \
    cpp/tests/drive.cpp cpp/kernels.cpp cpp/plan.cpp -o "$folder/$name"
}

builds=(baseline)
build baseline baseline "${memory[@]}" & jobs=($!)
if grep -qw f16c /proc/cpuinfo && grep -qw fma /proc/cpuinfo && grep -qw avx2 /proc/cpuinfo; then
  builds+=(avx2)
  build avx2 avx2 -mavx2 -mfma -mf16c "${memory[@]}" & jobs+=($!)
fi
wait "${jobs[@]}"
if grep -qw avx512dq /proc/cpuinfo && grep -qw avx512bw /proc/cpuinfo && grep -qw avx512vl /proc/cpuinfo; then
  builds+=(avx512)
  build avx512 avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c \
    -Wno-uninitialized -Wno-maybe-uninitialized "${memory[@]}" & jobs=($!)
fi
build threads baseline "${threads[@]}" & jobs+=($!)
wait "${jobs[@]}"

export UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive
for name in "${builds[@]}"; do
  "$folder/$name" "$problems"
done
# Addresses are not randomised: older versions of ThreadSanitizer do not start where they are by more than 28 bits.
setarch -R "$folder/threads" "$((problems / 4))"
