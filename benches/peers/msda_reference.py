"""Deformable DETR's own CUDA kernels beside valor's: github.com/fundamentalvision/Deformable-DETR, without torch's headers.

The kernels are in one header of a checkout, ms_deform_im2col_cuda.cuh. nvcc compiles it with the few lines below, in the
background while other cases run, and ctypes calls it on torch's tensors and stream. One call is what that project's
operator does on the GPU: its results made zero, then the kernels. Calls are repeated inside the library, so that nothing
of Python is timed.
"""
import ctypes, os, shutil, subprocess, tempfile
from pathlib import Path

HEADER = "ms_deform_im2col_cuda.cuh"
# What the header includes and, without torch, does not need: atomicAdd of f32 is CUDA's own.
STUBS = ["ATen/ATen.h", "ATen/cuda/CUDAContext.h", "THC/THCAtomics.cuh"]
SOURCE = r"""
#include <cstdint>
#include <cuda_runtime.h>
#include "ms_deform_im2col_cuda.cuh"

// batch, tokens, heads, channels, levels, queries, points
struct Sizes { int b, s, h, c, l, q, p; };

static int zero(void *x, size_t floats, cudaStream_t stream) {
  return cudaMemsetAsync(x, 0, floats * sizeof(float), stream);
}

extern "C" int forward(int calls, void *stream_, Sizes n, const float *value, const int64_t *shapes, const int64_t *starts,
                       const float *at, const float *weights, float *out) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  for (int i = 0; i < calls; ++i) {
    if (int e = zero(out, size_t(n.b) * n.q * n.h * n.c, stream)) return e;
    ms_deformable_im2col_cuda<float>(stream, value, shapes, starts, at, weights, n.b, n.s, n.h, n.c, n.l, n.q, n.p, out);
    if (int e = cudaPeekAtLastError()) return e;
  }
  return 0;
}

extern "C" int both(int calls, void *stream_, Sizes n, const float *value, const int64_t *shapes, const int64_t *starts,
                    const float *at, const float *weights, float *out, const float *gradient, float *to_value, float *to_at,
                    float *to_weights) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  size_t samples = size_t(n.b) * n.q * n.h * n.l * n.p;
  for (int i = 0; i < calls; ++i) {
    if (int e = forward(1, stream_, n, value, shapes, starts, at, weights, out)) return e;
    if (int e = zero(to_value, size_t(n.b) * n.s * n.h * n.c, stream)) return e;
    if (int e = zero(to_at, 2 * samples, stream)) return e;
    if (int e = zero(to_weights, samples, stream)) return e;
    ms_deformable_col2im_cuda<float>(stream, gradient, value, shapes, starts, at, weights, n.b, n.s, n.h, n.c, n.l, n.q, n.p,
                                     to_value, to_at, to_weights);
    if (int e = cudaPeekAtLastError()) return e;
  }
  return 0;
}
"""


class Sizes(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in "bshclqp"]


class Reference:
    """Begins to compile; the first use waits for it. `folder` holds the header, at whatever depth."""

    def __init__(self, folder, arch="sm_90"):
        header = next(Path(folder).rglob(HEADER), None)
        if header is None:
            raise FileNotFoundError(f"{folder}: no {HEADER} in it; it is to be a checkout of fundamentalvision/Deformable-DETR")
        self.folder, self.library = tempfile.TemporaryDirectory(prefix="msda-"), None
        at = Path(self.folder.name)
        for stub in STUBS:
            (at / stub).parent.mkdir(parents=True, exist_ok=True)
            (at / stub).touch()
        (at / "reference.cu").write_text(SOURCE)
        home = os.environ.get("CUDA_HOME")
        nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        command = [nvcc, "-O3", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-I", str(at), "-I", str(header.parent)]
        with open(at / "log", "w") as log:
            self.nvcc = subprocess.Popen([*command, "-o", "reference.so", "reference.cu"], cwd=at, stdout=log, stderr=log)

    def __call__(self, name, calls, stream, sizes, *tensors):
        """So many calls of the library's `forward` or `both`."""
        if self.library is None:
            at = Path(self.folder.name)
            if self.nvcc.wait():
                raise RuntimeError(f"nvcc: {(at / 'log').read_text()[-2000:]}")
            self.library = ctypes.CDLL(str(at / "reference.so"))
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        if error := getattr(self.library, name)(ctypes.c_int(calls), ctypes.c_void_p(stream), sizes, *pointers):
            raise RuntimeError(f"{name}: CUDA error {error}")
