#!/usr/bin/env bash
# Builds valor with --features cuda on a machine that has neither a GPU nor CUDA: nvcc and headers come from
# NVIDIA's Python wheels (105 MB), what is linked against are stubs with the right names. Some fifteen
# minutes on two cores. Where nvcc is installed, `cargo build --release --features cuda` is all it takes.
#
#   scripts/cuda_build.sh [CARGO'S ARGUMENTS, default: build --release]
#
# The toolkit is kept in VALOR_CUDA_TOOLKIT (default ~/.cache/valor-cuda13). CUDA_COMPUTE_CAP is the GPU's compute
# capability (default 90; 80 for A100, 89 for RTX 40). The binary wants at run time libcuda.so.1, libcurand.so.10,
# libcublas.so.13 and libcudart.so.13.
set -euo pipefail
cd "$(dirname "$0")/.."
home=${VALOR_CUDA_TOOLKIT:-$HOME/.cache/valor-cuda13}
cuda=$home/nvidia/cu13
if [ ! -x "$cuda/bin/nvcc" ]; then
  mkdir -p "$home/wheels"
  platforms=()
  for p in manylinux2014 manylinux_2_17 manylinux_2_12 manylinux2010; do platforms+=(--platform "${p}_x86_64"); done
  pip download -q --no-deps --only-binary=:all: "${platforms[@]}" -d "$home/wheels" nvidia-cuda-nvcc==13.0.88 \
    nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96
  for wheel in "$home"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$home"; done
  chmod +x "$cuda"/bin/* "$cuda"/nvvm/bin/*
fi
ln -sfn lib "$cuda/lib64"

# What the program calls of the driver and the libraries is in cudarc's bindings: functions of those names that
# do nothing, in libraries of those names, satisfy the linker.
cargo fetch -q
version=$(sed -n '/^name = "cudarc"$/{n;s/version = "\(.*\)"/\1/p}' Cargo.lock)
bindings=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-"$version"/src | head -1)
stubs=$cuda/lib/stubs
mkdir -p "$stubs"
while read -r part name soname; do
  grep -ohE 'pub unsafe fn (cu|nvrtc|curand|cublas)[A-Za-z0-9_]+' "$bindings/$part/sys/mod.rs" |
    awk '{print "void " $4 "(void){}"}' | sort -u >"$stubs/$name.c"
  cc -shared -fPIC -w -o "$stubs/lib$name.so" -Wl,-soname,"$soname" "$stubs/$name.c"
done <<'LIBRARIES'
driver cuda libcuda.so.1
nvrtc nvrtc libnvrtc.so.13
curand curand libcurand.so.10
cublas cublas libcublas.so.13
cublaslt cublasLt libcublasLt.so.13
LIBRARIES
ln -sf ../libcudart.so.13 "$stubs/libcudart.so"

export CUDA_HOME=$cuda CUDA_PATH=$cuda CUDA_ROOT=$cuda PATH="$cuda/bin:$PATH"
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} CUDARC_CUDA_VERSION=13000 CUDAFORGE_THREADS=${JOBS:-2}
[ $# -gt 0 ] || set -- build --release
cargo "$@" -j "${JOBS:-2}" --features cuda

# Drivers assemble PTX where it runs; once done here, what they would refuse shows now.
ptx=$(find "${CARGO_TARGET_DIR:-target}/release" -path '*/valor-*/out/kernels.ptx' -size +0 -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -1 | cut -d' ' -f2-)
[ -z "$ptx" ] || "$cuda/bin/ptxas" -arch="$(sed -n 's/^\.target \(sm_[0-9a-z]*\).*/\1/p' "$ptx")" -o /dev/null "$ptx"
