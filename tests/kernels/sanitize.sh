#!/usr/bin/env bash
# The kernels under AddressSanitizer with UndefinedBehaviorSanitizer, for each instruction set that this machine has,
# and under ThreadSanitizer, with threads in place of OpenMP, whose synchronisation it does not see. Two minutes.
#
#     sanitize.sh [folder for the programs] [problems]
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-build/sanitize}
problems=${2:-4000}
mkdir -p "$folder"

flags=(-std=c++20 -O1 -g1 -ffp-contract=off -Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized)
memory=(-fopenmp -pthread -fsanitize=address,undefined -fno-sanitize-recover=all)
threads=(-pthread -DBATCHNORM_PTHREADS -fsanitize=thread)
avx2=(-mavx2 -mfma -mf16c)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl)
avx512bf16=("${avx512[@]}" -mavx512bf16)
double=-DBATCHNORM_TEST_DOUBLE
bfloat16=-DBATCHNORM_TEST_BFLOAT16

# build NAME ISA OPTIONS...: the program `NAME`.
build() {
  local name=$1 isa=$2
  shift 2
  "${CXX:-c++}" "${flags[@]}" -DBATCHNORM_ISA="$isa" "$@" cpp/tests/drive.cpp cpp/plan.cpp cpp/memory.cpp cpp/helpers.cpp -o "$folder/$name"
}

# has NAMES...: whether the processor has all of these.
has() {
  for name; do grep -qw "$name" /proc/cpuinfo || return 1; done
}

# Two at a time: one takes a minute and a gigabyte. One that does not compile is missed below.
programs=(baseline)
rm -f "$folder"/{baseline,avx2,avx512,avx512bf16,threads}
build baseline baseline "$double" "${memory[@]}" &
build threads baseline "${threads[@]}" &
wait
if has avx2 fma f16c; then
  programs+=(avx2)
  build avx2 avx2 "${avx2[@]}" "$bfloat16" "${memory[@]}" &
fi
if has avx512f avx512bw avx512dq avx512vl fma f16c; then
  programs+=(avx512)
  build avx512 avx512 "${avx512[@]}" "$double" "$bfloat16" "${memory[@]}" &
fi
wait
if has avx512f avx512bw avx512dq avx512vl avx512_bf16 fma f16c; then
  programs+=(avx512bf16)
  build avx512bf16 avx512bf16 "${avx512bf16[@]}" "$bfloat16" "${memory[@]}"
fi

export UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive
export ASAN_OPTIONS=detect_leaks=0 # OpenMP keeps its threads' memory
for name in "${programs[@]}"; do
  echo -n "$name, memory: "
  "$folder/$name" "$problems"
done
# Addresses are not randomised: ThreadSanitizer before GCC 14 does not start where they are by more than 28 bits.
echo -n "baseline, threads: "
setarch -R "$folder/threads" "$((problems / 4))"
