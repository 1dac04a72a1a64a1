#!/usr/bin/env bash
# Type-checks and lints the CUDA build on a machine without CUDA: nvcc is a stand-in that compiles nothing.
# What the kernels compute is proved by `cargo test` (src/nn/kernels/tests.rs); that nvcc takes them, by
# scripts/cuda_build.sh, to be run for each change of a kernel.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v nvcc >/dev/null; then
  cuda=$PWD/target/nvcc-stand-in
  mkdir -p "$cuda/bin" "$cuda/include" "$cuda/lib64"
  cat >"$cuda/bin/nvcc" <<'NVCC'
#!/usr/bin/env bash
# Prints a version; else writes an empty file wherever one was asked for.
out='' dir=. source=''
while [ $# -gt 0 ]; do
  case $1 in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    -o) out=$2; shift ;;
    --output-directory) dir=$2; shift ;;
    *.cu) source=$1 ;;
  esac
  shift
done
[ -n "$out" ] || [ -z "$source" ] || out=$dir/$(basename "${source%.cu}").ptx
[ -z "$out" ] || : >"$out"
NVCC
  chmod +x "$cuda/bin/nvcc"
  : >"$cuda/include/cuda.h"
  # Apart from real builds, which would take its empty files for kernels.
  export CARGO_TARGET_DIR=$PWD/target/cuda-check
  export CUDA_HOME=$cuda CUDA_PATH=$cuda CUDA_ROOT=$cuda CUDA_TOOLKIT_ROOT_DIR=$cuda PATH="$cuda/bin:$PATH"
fi
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} CUDARC_CUDA_VERSION=${CUDARC_CUDA_VERSION:-13000}
cargo clippy --release --all-targets --features cuda -- -D warnings
