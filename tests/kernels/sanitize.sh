#!/usr/bin/env bash
# Runs the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, for each instruction set that this machine has,
# and under ThreadSanitizer, with threads instead of OpenMP, whose synchronization it does not see. Then runs the whole
# extension, with the baseline kernels, under AddressSanitizer and UndefinedBehaviorSanitizer, by random valid and hostile
# calls from the Python in $PYTHON (default: that of .venv), which needs nanobind, NumPy and PyTorch. Takes four minutes.
#
#     sanitize.sh [folder for the programs] [problems] [calls]
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-build/sanitize}
problems=${2:-4000}
calls=${3:-20000}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"

flags=(-std=c++20 -O1 -g1 -ffp-contract=off -Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized)
memory=(-fopenmp -pthread -fsanitize=address,undefined -fno-sanitize-recover=all)
threads=(-pthread -DBATCHNORM_PTHREADS -fsanitize=thread)
avx2=(-mavx2 -mfma -mf16c)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl)
avx512bf16=("${avx512[@]}" -mavx512bf16)
double=-DBATCHNORM_TEST_DOUBLE
bfloat16=-DBATCHNORM_TEST_BFLOAT16

# build NAME ISA OPTIONS...: compiles the program `NAME`.
build() {
  local name=$1 isa=$2
  shift 2
  "${CXX:-c++}" "${flags[@]}" -DBATCHNORM_ISA="$isa" "$@" cpp/tests/fuzz.cpp cpp/caches.cpp cpp/plan.cpp cpp/memory.cpp cpp/external_pool.cpp -o "$folder/$name"
}

# Compiles the extension with the baseline kernels only.
build_extension() {
  local of_nanobind of_python
  of_nanobind=$("$python" -m nanobind --include_dir)
  of_python=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  "${CXX:-c++}" "${flags[@]}" -DBATCHNORM_ISA=baseline '-DBATCHNORM_INSTRUCTION_SETS="baseline"' -DNDEBUG "${memory[@]}" \
    -fPIC -shared -fvisibility=hidden -fno-strict-aliasing -isystem "$of_python" -isystem "$of_nanobind" \
    -isystem "$of_nanobind/../ext/robin_map/include" "$of_nanobind/../src/nb_combined.cpp" \
    cpp/{bindings,caches,call,library,checks,arrays,layout,dispatch,external_pool,memory,plan,running,xla,kernels}.cpp -o "$folder/_native.so"
}

# has NAMES...: succeeds if the processor has all of these features.
has() {
  for name; do grep -qw "$name" /proc/cpuinfo || return 1; done
}

# Two at a time, because each takes a minute and a gigabyte. A program that does not compile fails when it is run below.
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
export ASAN_OPTIONS=detect_leaks=0 # OpenMP never frees the memory of its threads
for name in "${programs[@]}"; do
  echo -n "$name, memory: "
  "$folder/$name" "$problems"
done
# Without address randomization: ThreadSanitizer before GCC 14 does not start with more than 28 random bits.
echo -n "baseline, threads: "
setarch -R "$folder/threads" "$((problems / 4))"

# The interpreter is not compiled for AddressSanitizer, so its library has to be preloaded, with that of C++, in which it
# looks for the function that throws. The quarantine is small, so that growing memory indicates a leak.
build_extension
echo "extension, calls from Python:"
library() { "${CXX:-c++}" -print-file-name="$1"; }
LD_PRELOAD="$(library libasan.so) $(library libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8:allocator_may_return_null=1 \
  PYTHONPATH=src "$python" -X faulthandler tests/kernels/fuzz_native.py --extension "$folder/_native.so" --calls "$calls"
