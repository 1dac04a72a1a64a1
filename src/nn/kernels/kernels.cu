// valor's CUDA kernels: what candle has no kernel for, or none with a backward pass.
//
// Each body is written in phases. THREADS(t) runs what follows for every thread of the block and SYNC
// ends a phase; nothing that one thread knows outlives a phase but in shared memory, or in n numbers of its OWN
// (registers, if they are only ever indexed by constants), which thread t finds by OF. So the same text
// compiles as C++ on the host (see the second half of the macros), where a test runs every kernel
// against the processor's own ops: a machine without a GPU proves all but the launch.
//
// Numbers are computed in f32 whatever their type in memory. Grids are (x, y); blocks are one row of
// threads, a power of two of them. No kernel here but msda_back_loose depends on the order in which threads
// run: sums are trees or, where many blocks add to one place, integers. Threads add up over a block (block_sum) or over
// groups of a warp's lanes (lane_sums), which both halves of the macros have in their own way.

#include <math.h>
#include <stddef.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define THREADS(t) for (unsigned t = threadIdx.x, once_ = 1; once_; once_ = 0)
#define SYNC __syncthreads()
#define UNROLL _Pragma("unroll")
#define OWN(name, n) float name[n]
#define OF(name, n, t) (name)
#define DEFINE(name, type, T)                                                                                \
  extern "C" __global__ void name##_##type(name##_PARAMS(T)) { name##_body<T>(name##_ARGS); }
#define EACH(name) DEFINE(name, f32, float) DEFINE(name, f16, __half) DEFINE(name, bf16, __nv_bfloat16)

DEVICE float get(const float *p) { return *p; }
DEVICE float get(const __half *p) { return __half2float(*p); }
DEVICE float get(const __nv_bfloat16 *p) { return __bfloat162float(*p); }
DEVICE void put(float *p, float v) { *p = v; }
DEVICE void put(__half *p, float v) { *p = __float2half(v); }
DEVICE void put(__nv_bfloat16 *p, float v) { *p = __float2bfloat16(v); }
DEVICE void add_whole(long long *p, long long v) {
  atomicAdd(reinterpret_cast<unsigned long long *>(p), static_cast<unsigned long long>(v));
}
DEVICE void add_float(float *p, float v) { atomicAdd(p, v); }
// Four in a row, the first at a multiple of their size.
DEVICE void add_floats(float *p, const float *v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) atomicAdd(p + i, v[i]);
#endif
}

// Eight numbers as they lie, at an address that is a multiple of their size.
template <class T> struct Eight {
  uint4 raw;
};
template <> struct Eight<float> {
  float4 a, b;
};
template <class T> DEVICE Eight<T> eight(const T *p) { return *reinterpret_cast<const Eight<T> *>(p); }
DEVICE void widen(const Eight<float> &e, float *v) {
  v[0] = e.a.x, v[1] = e.a.y, v[2] = e.a.z, v[3] = e.a.w, v[4] = e.b.x, v[5] = e.b.y, v[6] = e.b.z, v[7] = e.b.w;
}
DEVICE void widen(const Eight<__nv_bfloat16> &e, float *v) {
  unsigned w[4] = {e.raw.x, e.raw.y, e.raw.z, e.raw.w};
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(w[i] << 16);
    v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
}
DEVICE void widen(const Eight<__half> &e, float *v) {
  const __half2 *w = reinterpret_cast<const __half2 *>(&e.raw);
  for (int i = 0; i < 4; ++i) {
    float2 f = __half22float2(w[i]);
    v[2 * i] = f.x;
    v[2 * i + 1] = f.y;
  }
}

// Four numbers, likewise.
DEVICE void get4(const float *p, float *v) {
  float4 a = *reinterpret_cast<const float4 *>(p);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
}
DEVICE void get4(const __nv_bfloat16 *p, float *v) {
  uint2 a = *reinterpret_cast<const uint2 *>(p);
  v[0] = __uint_as_float(a.x << 16), v[1] = __uint_as_float(a.x & 0xffff0000u);
  v[2] = __uint_as_float(a.y << 16), v[3] = __uint_as_float(a.y & 0xffff0000u);
}
DEVICE void get4(const __half *p, float *v) {
  uint2 a = *reinterpret_cast<const uint2 *>(p);
  const __half2 *w = reinterpret_cast<const __half2 *>(&a);
  float2 f = __half22float2(w[0]), g = __half22float2(w[1]);
  v[0] = f.x, v[1] = f.y, v[2] = g.x, v[3] = g.y;
}

DEVICE void put4(float *p, const float *v) { *reinterpret_cast<float4 *>(p) = make_float4(v[0], v[1], v[2], v[3]); }
DEVICE void put4(__nv_bfloat16 *p, const float *v) {
  __nv_bfloat162 w[2] = {__floats2bfloat162_rn(v[0], v[1]), __floats2bfloat162_rn(v[2], v[3])};
  *reinterpret_cast<uint2 *>(p) = *reinterpret_cast<const uint2 *>(w);
}
DEVICE void put4(__half *p, const float *v) {
  __half2 w[2] = {__floats2half2_rn(v[0], v[1]), __floats2half2_rn(v[2], v[3])};
  *reinterpret_cast<uint2 *>(p) = *reinterpret_cast<const uint2 *>(w);
}

DEVICE unsigned bits(float v) { return __float_as_uint(v); }
DEVICE float from_bits(unsigned b) { return __uint_as_float(b); }
DEVICE void take_most(unsigned *p, unsigned v) { atomicMax(p, v); }

// f(t, v) gives N numbers of thread t; g(k, v) takes their sums over the k-th LANES threads.
template <int N, int LANES, class F, class G> DEVICE void lane_sums(F f, G g) {
  float v[N];
  f(threadIdx.x, v);
  for (int n = 0; n < N; ++n)
    for (int lane = LANES / 2; lane > 0; lane /= 2) v[n] += __shfl_xor_sync(0xffffffffu, v[n], lane);
  if (threadIdx.x % LANES == 0) g(threadIdx.x / LANES, v);
}

// op over the block's f(t), to all threads. `scratch` holds a number per warp.
template <class F, class O> DEVICE float block_reduce(float *scratch, float none, F f, O op) {
  float v = f(threadIdx.x);
  for (int lane = 16; lane > 0; lane /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, lane));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : none;
  for (int lane = 16; lane > 0; lane /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, lane));
  __syncthreads();
  return v;
}
#else
#include <string.h>

#include <utility>

struct Place {
  unsigned x, y;
};
static thread_local Place blockIdx, gridDim, blockDim;

// Arguments come as a launch on the GPU takes them: an array of addresses.
template <class... A, size_t... I>
static void call(void (*body)(A...), void **args, std::index_sequence<I...>) {
  body(*static_cast<A *>(args[I])...);
}

template <class... A>
static void every_block(void (*body)(A...), unsigned columns, unsigned rows, unsigned threads, void **args) {
  gridDim = {columns, rows};
  blockDim = {threads, 1};
  for (unsigned y = 0; y < rows; ++y)
    for (unsigned x = 0; x < columns; ++x) {
      blockIdx = {x, y};
      call(body, args, std::index_sequence_for<A...>());
    }
}

#define DEVICE static inline
#define SHARED static thread_local
#define THREADS(t) for (unsigned t = 0; t < blockDim.x; ++t)
#define SYNC
#define UNROLL
#define OWN(name, n) static thread_local float name[1024 * (n)]
#define OF(name, n, t) (name + (t) * (n))
#define DEFINE(name, type, T)                                                                                \
  extern "C" void name##_##type(unsigned columns, unsigned rows, unsigned threads, void **args) {            \
    every_block(&name##_body<T>, columns, rows, threads, args);                                              \
  }
#define EACH(name) DEFINE(name, f32, float)

DEVICE float get(const float *p) { return *p; }
DEVICE void put(float *p, float v) { *p = v; }
DEVICE void add_whole(long long *p, long long v) { *p += v; }
DEVICE void add_float(float *p, float v) { *p += v; }
DEVICE void add_floats(float *p, const float *v) {
  for (int i = 0; i < 4; ++i) p[i] += v[i];
}

template <class T> struct Eight {
  const T *at;
};
template <class T> DEVICE Eight<T> eight(const T *p) { return {p}; }
DEVICE void widen(const Eight<float> &e, float *v) {
  for (int i = 0; i < 8; ++i) v[i] = e.at[i];
}

DEVICE void get4(const float *p, float *v) {
  for (int i = 0; i < 4; ++i) v[i] = p[i];
}

DEVICE void put4(float *p, const float *v) {
  for (int i = 0; i < 4; ++i) p[i] = v[i];
}

DEVICE unsigned bits(float v) {
  unsigned b;
  memcpy(&b, &v, sizeof b);
  return b;
}
DEVICE float from_bits(unsigned b) {
  float v;
  memcpy(&v, &b, sizeof v);
  return v;
}
DEVICE void take_most(unsigned *p, unsigned v) { *p = *p < v ? v : *p; }

template <int N, int LANES, class F, class G> DEVICE void lane_sums(F f, G g) {
  for (unsigned k = 0; k < blockDim.x / LANES; ++k) {
    float sum[N] = {}, v[N];
    for (unsigned lane = 0; lane < LANES; ++lane) {
      f(k * LANES + lane, v);
      for (int n = 0; n < N; ++n) sum[n] += v[n];
    }
    g(k, sum);
  }
}

template <class F, class O> DEVICE float block_reduce(float *, float none, F f, O op) {
  // In lanes, as a long sum one after the other would round more than the GPU's.
  float lanes[32];
  for (float &v : lanes) v = none;
  THREADS(t) { lanes[t % 32] = op(lanes[t % 32], f(t)); }
  for (float v : lanes) none = op(none, v);
  return none;
}
#endif

// Blocks are of at least a warp.
const unsigned MOST_WARPS = 32;

template <class F> DEVICE float block_sum(float *scratch, F f) {
  return block_reduce(scratch, 0.f, f, [](float a, float b) { return a + b; });
}

template <class F> DEVICE float block_max(float *scratch, F f) {
  return block_reduce(scratch, -INFINITY, f, [](float a, float b) { return fmaxf(a, b); });
}

// ---- RMSNorm (Zhang & Sennrich 2019): a block per row of d values.

template <class T> DEVICE float inverse_rms(const T *x, unsigned d, float eps, float *scratch) {
  float squares = block_sum(scratch, [&](unsigned t) {
    float s = 0.f;
    for (unsigned i = t; i < d; i += blockDim.x) s += get(x + i) * get(x + i);
    return s;
  });
  return 1.f / sqrtf(squares / d + eps);
}

#define rms_norm_PARAMS(T) const T *x, const T *w, T *y, unsigned d, float eps
#define rms_norm_ARGS x, w, y, d, eps
template <class T> DEVICE void rms_norm_body(rms_norm_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  size_t row = static_cast<size_t>(blockIdx.x) * d;
  float inv = inverse_rms(x + row, d, eps, scratch);
  THREADS(t) {
    for (unsigned i = t; i < d; i += blockDim.x) put(y + row + i, get(x + row + i) * inv * get(w + i));
  }
}
EACH(rms_norm)

// dx = (g w - x mean(g w x) inv^2) inv, and inv of each row for the weight's gradient.
#define rms_norm_back_PARAMS(T) const T *x, const T *w, const T *g, T *dx, float *inverse, unsigned d, float eps
#define rms_norm_back_ARGS x, w, g, dx, inverse, d, eps
template <class T> DEVICE void rms_norm_back_body(rms_norm_back_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  size_t row = static_cast<size_t>(blockIdx.x) * d;
  float inv = inverse_rms(x + row, d, eps, scratch);
  float c = block_sum(scratch, [&](unsigned t) {
    float s = 0.f;
    for (unsigned i = t; i < d; i += blockDim.x) s += get(g + row + i) * get(w + i) * get(x + row + i);
    return s;
  });
  c *= inv * inv / d;
  THREADS(t) {
    for (unsigned i = t; i < d; i += blockDim.x)
      put(dx + row + i, (get(g + row + i) * get(w + i) - get(x + row + i) * c) * inv);
    if (t == 0) inverse[blockIdx.x] = inv;
  }
}
EACH(rms_norm_back)

// ---- LayerNorm (Ba et al. 2016): a block per row; `moments` holds mean and 1/sigma of each row.

template <class T> DEVICE void mean_and_inverse(const T *x, unsigned d, float eps, float *scratch, float *out) {
  float mean = block_sum(scratch, [&](unsigned t) {
    float s = 0.f;
    for (unsigned i = t; i < d; i += blockDim.x) s += get(x + i);
    return s;
  }) / d;
  float var = block_sum(scratch, [&](unsigned t) {
    float s = 0.f;
    for (unsigned i = t; i < d; i += blockDim.x) s += (get(x + i) - mean) * (get(x + i) - mean);
    return s;
  }) / d;
  out[0] = mean;
  out[1] = 1.f / sqrtf(var + eps);
}

#define layer_norm_PARAMS(T) const T *x, const T *w, const T *b, T *y, unsigned d, float eps
#define layer_norm_ARGS x, w, b, y, d, eps
template <class T> DEVICE void layer_norm_body(layer_norm_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  size_t row = static_cast<size_t>(blockIdx.x) * d;
  float m[2];
  mean_and_inverse(x + row, d, eps, scratch, m);
  THREADS(t) {
    for (unsigned i = t; i < d; i += blockDim.x)
      put(y + row + i, (get(x + row + i) - m[0]) * m[1] * get(w + i) + get(b + i));
  }
}
EACH(layer_norm)

#define layer_norm_back_PARAMS(T)                                                                            \
  const T *x, const T *w, const T *g, T *dx, float *moments, unsigned d, float eps
#define layer_norm_back_ARGS x, w, g, dx, moments, d, eps
template <class T> DEVICE void layer_norm_back_body(layer_norm_back_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  size_t row = static_cast<size_t>(blockIdx.x) * d;
  float m[2];
  mean_and_inverse(x + row, d, eps, scratch, m);
  float c0 = block_sum(scratch, [&](unsigned t) {
    float s = 0.f;
    for (unsigned i = t; i < d; i += blockDim.x) s += get(g + row + i) * get(w + i);
    return s;
  }) / d;
  float c1 = block_sum(scratch, [&](unsigned t) {
    float s = 0.f;
    for (unsigned i = t; i < d; i += blockDim.x)
      s += get(g + row + i) * get(w + i) * (get(x + row + i) - m[0]) * m[1];
    return s;
  }) / d;
  THREADS(t) {
    for (unsigned i = t; i < d; i += blockDim.x) {
      float hat = (get(x + row + i) - m[0]) * m[1];
      put(dx + row + i, (get(g + row + i) * get(w + i) - c0 - hat * c1) * m[1]);
    }
    if (t < 2) moments[2 * static_cast<size_t>(blockIdx.x) + t] = m[t];
  }
}
EACH(layer_norm_back)

// Gradients of a norm's weight and bias over rows: a block sums its share of the rows (grid y) for as
// many columns as it has threads (grid x) into partial[y][2][d]; what remains is a sum over y.
// `moments` holds `per_row` numbers a row: 1/rms, or mean and 1/sigma.
#define norm_weight_back_PARAMS(T)                                                                           \
  const T *x, const T *g, const float *moments, float *partial, unsigned rows, unsigned d, unsigned per_row
#define norm_weight_back_ARGS x, g, moments, partial, rows, d, per_row
template <class T> DEVICE void norm_weight_back_body(norm_weight_back_PARAMS(T)) {
  THREADS(t) {
    unsigned i = blockIdx.x * blockDim.x + t;
    if (i < d) {
      unsigned share = (rows + gridDim.y - 1) / gridDim.y;
      unsigned from = blockIdx.y * share, to = from + share < rows ? from + share : rows;
      float dw = 0.f, db = 0.f;
      for (unsigned r = from; r < to; ++r) {
        const float *m = moments + static_cast<size_t>(r) * per_row;
        float mean = per_row == 2 ? m[0] : 0.f;
        size_t at = static_cast<size_t>(r) * d + i;
        dw += get(g + at) * (get(x + at) - mean) * m[per_row - 1];
        db += get(g + at);
      }
      float *out = partial + static_cast<size_t>(blockIdx.y) * 2 * d;
      out[i] = dw;
      out[d + i] = db;
    }
  }
}
EACH(norm_weight_back)

// ---- Rotary positions (Su et al. 2021), halves of a head: a block per token; sign -1 turns back.

#define rope_PARAMS(T)                                                                                       \
  const T *x, const float *cosine, const float *sine, T *y, unsigned width, unsigned half, unsigned period, \
      float sign
#define rope_ARGS x, cosine, sine, y, width, half, period, sign
template <class T> DEVICE void rope_body(rope_PARAMS(T)) {
  size_t token = blockIdx.x, angle = static_cast<size_t>(blockIdx.x % period) * half;
  THREADS(t) {
    for (unsigned i = t; i < width / 2; i += blockDim.x) {
      unsigned head = i / half, k = i % half;
      size_t at = token * width + head * 2 * half + k;
      float c = cosine[angle + k], s = sine[angle + k] * sign;
      float a = get(x + at), b = get(x + at + half);
      put(y + at, a * c - b * s);
      put(y + at + half, b * c + a * s);
    }
  }
}
EACH(rope)

// Each head normalised (RMSNorm, weight w of 2 half values) and then rotated: a block per token and head. A token's
// heads lie together, one token's first `stride` after the last one's.
#define norm_rope_PARAMS(T)                                                                                  \
  const T *x, const T *w, const float *cosine, const float *sine, T *y, unsigned heads, size_t stride,        \
      unsigned half, unsigned period, float eps
#define norm_rope_ARGS x, w, cosine, sine, y, heads, stride, half, period, eps
template <class T> DEVICE void norm_rope_body(norm_rope_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  unsigned at = blockIdx.x / heads;
  size_t token = at, head = blockIdx.x % heads, angle = static_cast<size_t>(at % period) * half;
  const T *from = x + token * stride + head * 2 * half;
  T *to = y + static_cast<size_t>(blockIdx.x) * 2 * half;
  float inv = inverse_rms(from, 2 * half, eps, scratch);
  THREADS(t) {
    for (unsigned k = t; k < half; k += blockDim.x) {
      float c = cosine[angle + k], s = sine[angle + k];
      float a = get(from + k) * inv * get(w + k), b = get(from + k + half) * inv * get(w + k + half);
      put(to + k, a * c - b * s);
      put(to + k + half, b * c + a * s);
    }
  }
}
EACH(norm_rope)

// ---- silu(a) u (Shazeer 2020), pointwise.

#define swiglu_PARAMS(T) const T *a, const T *u, T *y, size_t n
#define swiglu_ARGS a, u, y, n
template <class T> DEVICE void swiglu_body(swiglu_PARAMS(T)) {
  THREADS(t) {
    size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + t;
    if (i < n) {
      float v = get(a + i);
      put(y + i, v / (1.f + expf(-v)) * get(u + i));
    }
  }
}
EACH(swiglu)

#define swiglu_back_PARAMS(T) const T *a, const T *u, const T *g, T *da, T *du, size_t n
#define swiglu_back_ARGS a, u, g, da, du, n
template <class T> DEVICE void swiglu_back_body(swiglu_back_PARAMS(T)) {
  THREADS(t) {
    size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + t;
    if (i < n) {
      float v = get(a + i), grad = get(g + i), s = 1.f / (1.f + expf(-v));
      put(da + i, grad * get(u + i) * s * (1.f + v * (1.f - s)));
      put(du + i, grad * v * s);
    }
  }
}
EACH(swiglu_back)

// ---- Products of f32 on units that round factors to TF32 (11 bits): a b is hi hi + lo hi + hi lo, where hi is a factor
// rounded and lo what that leaves, rounded; what is left out is 2^-22 of it (Ootomo & Yokota 2022, though sums stay in the
// units here). So one product of sums three times as long is nearly f32's. Rows of `width` numbers become hi, lo, hi (or
// hi, hi, lo for the other factor): each row three times in a row, or all of them three times, `apart`. A thread does four
// numbers where `fours`: the width is a multiple of it then.

DEVICE float tf32(float v) { return from_bits((bits(v) + 0x1000u) & 0xffffe000u); }

#define split_PARAMS(T) const T *x, T *y, unsigned n, unsigned width, size_t apart, unsigned other, unsigned fours
#define split_ARGS x, y, n, width, apart, other, fours
template <class T, int W> DEVICE void split_by(split_PARAMS(T)) {
  (void)fours;
  THREADS(t) {
    unsigned i = (blockIdx.x * blockDim.x + t) * W;
    if (i < n) {
      float v[4], hi[4], lo[4];
      if (W == 4)
        get4(x + i, v);
      else
        v[0] = get(x + i);
      for (int k = 0; k < W; ++k) {
        // Near the largest number, beyond it, or none: whole, as it is. (Rounding can make a number of what is none.)
        bool whole = !(fabsf(v[k]) < 3e38f);
        hi[k] = whole ? v[k] : tf32(v[k]);
        lo[k] = whole ? 0.f : tf32(v[k] - hi[k]);
      }
      size_t at = apart ? i : static_cast<size_t>(i / width) * 3 * width + i % width, step = apart ? apart : width;
      auto write = [&](T *to, const float *from) {
        if (W == 4)
          put4(to, from);
        else
          put(to, from[0]);
      };
      write(y + at, hi);
      write(y + at + step, other ? hi : lo);
      write(y + at + 2 * step, other ? lo : hi);
    }
  }
}
template <class T> DEVICE void split_body(split_PARAMS(T)) {
  if (fours)
    split_by<T, 4>(split_ARGS);
  else
    split_by<T, 1>(split_ARGS);
}
DEFINE(split, f32, float)

// ---- Products with few rows: y = x W^T, memory-bound by the weights, which are read once. A warp sums two output
// numbers of every row, so that what it reads of x serves both; k is a multiple of 8, so that sixteen bytes are read
// at once.

const unsigned MOST_ROWS = 4;

// Adds to v[2 r], v[2 r + 1] the lane's share of the products of x's row r with two rows of weights.
template <class T, int ROWS> DEVICE void dot_rows(const T *x, const T *w, const T *u, unsigned k, unsigned lane, float *v) {
  const int AHEAD = 4;
  const unsigned STEP = 256;
  auto multiply = [&](const Eight<T> &first, const Eight<T> &second, unsigned i) {
    float a[8], b[8], c[8];
    widen(first, a);
    widen(second, b);
    for (int r = 0; r < ROWS; ++r) {
      widen(eight(x + static_cast<size_t>(r) * k + i), c);
      for (int j = 0; j < 8; ++j) {
        v[2 * r] += a[j] * c[j];
        v[2 * r + 1] += b[j] * c[j];
      }
    }
  };
  unsigned i = 8 * lane;
  // Many reads are under way at once.
  for (; i + (AHEAD - 1) * STEP < k; i += AHEAD * STEP) {
    Eight<T> a[AHEAD], b[AHEAD];
    for (int n = 0; n < AHEAD; ++n) {
      a[n] = eight(w + i + n * STEP);
      b[n] = eight(u + i + n * STEP);
    }
    for (int n = 0; n < AHEAD; ++n) multiply(a[n], b[n], i + n * STEP);
  }
  for (; i < k; i += STEP) multiply(eight(w + i), eight(u + i), i);
}

// Up to three weights of n0, n1, n2 rows side by side in y [ROWS, n0 + n1 + n2]; `plus`, of y's shape, is added
// where there is one.
template <class T, int ROWS>
DEVICE void few_rows_of(const T *x, const T *w0, const T *w1, const T *w2, const T *plus, T *y, unsigned n0, unsigned n1,
                        unsigned n2, unsigned k) {
  unsigned n = n0 + n1 + n2, first = blockIdx.x * (blockDim.x / 16);
  auto weights = [&](unsigned o) {
    return o < n0 ? w0 + static_cast<size_t>(o) * k
        : o < n0 + n1 ? w1 + static_cast<size_t>(o - n0) * k
                      : w2 + static_cast<size_t>(o - n0 - n1) * k;
  };
  lane_sums<2 * ROWS, 32>(
      [&](unsigned t, float *v) {
        unsigned o = first + t / 32 * 2;
        for (int r = 0; r < 2 * ROWS; ++r) v[r] = 0.f;
        // The last row of an odd number is summed twice, and written once.
        if (o < n) dot_rows<T, ROWS>(x, weights(o), weights(o + 1 < n ? o + 1 : o), k, t % 32, v);
      },
      [&](unsigned warp, const float *v) {
        for (unsigned i = 0; i < 2; ++i) {
          unsigned o = first + warp * 2 + i;
          if (o >= n) return;
          for (int r = 0; r < ROWS; ++r) {
            size_t at = static_cast<size_t>(r) * n + o;
            put(y + at, v[2 * r + i] + (plus ? get(plus + at) : 0.f));
          }
        }
      });
}

#define few_rows_PARAMS(T)                                                                                   \
  const T *x, const T *w0, const T *w1, const T *w2, const T *plus, T *y, unsigned rows, unsigned n0,        \
      unsigned n1, unsigned n2, unsigned k
#define few_rows_ARGS x, w0, w1, w2, plus, y, rows, n0, n1, n2, k
template <class T> DEVICE void few_rows_body(few_rows_PARAMS(T)) {
  switch (rows) {
  case 1: return few_rows_of<T, 1>(x, w0, w1, w2, plus, y, n0, n1, n2, k);
  case 2: return few_rows_of<T, 2>(x, w0, w1, w2, plus, y, n0, n1, n2, k);
  case 3: return few_rows_of<T, 3>(x, w0, w1, w2, plus, y, n0, n1, n2, k);
  default: return few_rows_of<T, MOST_ROWS>(x, w0, w1, w2, plus, y, n0, n1, n2, k);
  }
}
EACH(few_rows)

// silu(x gate^T) (x up^T), both of n rows: a warp for each number of a row.
template <class T, int ROWS>
DEVICE void few_rows_gated_of(const T *x, const T *gate, const T *up, T *y, unsigned n, unsigned k) {
  unsigned first = blockIdx.x * (blockDim.x / 32);
  lane_sums<2 * ROWS, 32>(
      [&](unsigned t, float *v) {
        size_t o = first + t / 32;
        for (int r = 0; r < 2 * ROWS; ++r) v[r] = 0.f;
        if (o < n) dot_rows<T, ROWS>(x, gate + o * k, up + o * k, k, t % 32, v);
      },
      [&](unsigned warp, const float *v) {
        unsigned o = first + warp;
        if (o >= n) return;
        for (int r = 0; r < ROWS; ++r)
          put(y + static_cast<size_t>(r) * n + o, v[2 * r] / (1.f + expf(-v[2 * r])) * v[2 * r + 1]);
      });
}

#define few_rows_gated_PARAMS(T) const T *x, const T *gate, const T *up, T *y, unsigned rows, unsigned n, unsigned k
#define few_rows_gated_ARGS x, gate, up, y, rows, n, k
template <class T> DEVICE void few_rows_gated_body(few_rows_gated_PARAMS(T)) {
  switch (rows) {
  case 1: return few_rows_gated_of<T, 1>(x, gate, up, y, n, k);
  case 2: return few_rows_gated_of<T, 2>(x, gate, up, y, n, k);
  case 3: return few_rows_gated_of<T, 3>(x, gate, up, y, n, k);
  default: return few_rows_gated_of<T, MOST_ROWS>(x, gate, up, y, n, k);
  }
}
EACH(few_rows_gated)

// ---- What follows a product: act(x + b) s + plus, where x is [outer, channels, inner], b and s are [channels], and
// plus has x's shape; each of the three may be missing. act: 0 none, 1 GELU (Hendrycks & Gimpel 2016, exact), 2 ReLU.

// A thread does four numbers where `fours`: n and the numbers of a channel in a row are multiples of it then.

#define finish_PARAMS(T)                                                                                     \
  const T *x, const T *b, const T *s, const T *plus, T *y, size_t n, unsigned channels, unsigned inner,      \
      unsigned act, unsigned fours
#define finish_ARGS x, b, s, plus, y, n, channels, inner, act, fours
template <class T, int W> DEVICE void finish_by(finish_PARAMS(T)) {
  (void)fours;
  auto read = [](const T *p, float *v) {
    if (W == 4)
      get4(p, v);
    else
      v[0] = get(p);
  };
  // Of a channel's number, or of four channels that follow each other.
  auto read_channels = [&](const T *p, size_t c, float *v) {
    if (inner == 1)
      read(p + c, v);
    else
      for (int k = 0; k < W; ++k) v[k] = get(p + c);
  };
  THREADS(t) {
    size_t i = (static_cast<size_t>(blockIdx.x) * blockDim.x + t) * W;
    if (i < n) {
      // Division of 64 bits is slow, and seldom needed.
      size_t c = n >> 32 ? i / inner % channels : static_cast<unsigned>(i) / inner % channels;
      float v[4], bias[4] = {0.f, 0.f, 0.f, 0.f}, scale[4] = {1.f, 1.f, 1.f, 1.f}, more[4] = {0.f, 0.f, 0.f, 0.f};
      read(x + i, v);
      if (b) read_channels(b, c, bias);
      if (s) read_channels(s, c, scale);
      if (plus) read(plus + i, more);
      for (int k = 0; k < W; ++k) {
        v[k] += bias[k];
        if (act == 1) v[k] = 0.5f * v[k] * (1.f + erff(v[k] * 0.70710678118654752f));
        // Not fmaxf, which would make a number of what is none.
        if (act == 2) v[k] = v[k] < 0.f ? 0.f : v[k];
        v[k] = v[k] * scale[k] + more[k];
      }
      if (W == 4)
        put4(y + i, v);
      else
        put(y + i, v[0]);
    }
  }
}

template <class T> DEVICE void finish_body(finish_PARAMS(T)) {
  if (fours)
    finish_by<T, 4>(finish_ARGS);
  else
    finish_by<T, 1>(finish_ARGS);
}
EACH(finish)

// ---- softmax(scale x + bias) of rows of m scores [batch, heads, queries, m]: a block per row. The bias, where there
// is one, is f32; its row is found by its strides. Where `first` is not negative, query i sees the keys up to
// first + i alone, of which those from `prefix` to own[batch] (if there is one) are padding, but always its last. A
// row that sees nothing, or -inf alone, gives zeros. y may be x.

#define softmax_PARAMS(T)                                                                                    \
  const T *x, const float *bias, const unsigned *own, T *y, unsigned m, unsigned heads, unsigned queries,    \
      size_t of_batch, size_t of_head, size_t of_query, int first, unsigned prefix, float scale
#define softmax_ARGS x, bias, own, y, m, heads, queries, of_batch, of_head, of_query, first, prefix, scale
// One row, and what its query sees of the keys: those up to `last` that lie before `prefix` or from `begin` on.
template <class T> struct Scores {
  const T *from;
  const float *plus;
  unsigned last, begin, prefix;
  float scale;
};

template <class T> DEVICE float score(const Scores<T> &row, unsigned i, float x) {
  bool seen = i <= row.last && (i >= row.begin || i < row.prefix || i == row.last);
  return seen ? row.scale * x + (row.plus ? row.plus[i] : 0.f) : -INFINITY;
}

// A row of at most 4 K numbers for each thread, which keeps them between the passes. `even`: they are read and written
// in fours.
template <class T, int K> DEVICE void softmax_kept(const Scores<T> &row, T *y, unsigned m, bool even, float *scratch) {
  OWN(kept, 4 * K);
  float top = block_max(scratch, [&](unsigned t) {
    float *v = OF(kept, 4 * K, t), most = -INFINITY;
    UNROLL for (int k = 0; k < K; ++k) {
      unsigned i = 4 * (t + k * blockDim.x);
      float four[4] = {0.f, 0.f, 0.f, 0.f};
      if (even) {
        if (i <= row.last) get4(row.from + i, four);
      } else {
        UNROLL for (int j = 0; j < 4; ++j) if (i + j <= row.last) four[j] = get(row.from + i + j);
      }
      UNROLL for (int j = 0; j < 4; ++j) {
        v[4 * k + j] = score(row, i + j, four[j]);
        most = fmaxf(most, v[4 * k + j]);
      }
    }
    return most;
  });
  float base = top == -INFINITY ? 0.f : top;
  float sum = block_sum(scratch, [&](unsigned t) {
    float *v = OF(kept, 4 * K, t), s = 0.f;
    UNROLL for (int k = 0; k < 4 * K; ++k) {
      v[k] = expf(v[k] - base);
      s += v[k];
    }
    return s;
  });
  float inv = sum == 0.f ? 0.f : 1.f / sum;
  THREADS(t) {
    float *v = OF(kept, 4 * K, t);
    UNROLL for (int k = 0; k < K; ++k) {
      unsigned i = 4 * (t + k * blockDim.x);
      float four[4];
      UNROLL for (int j = 0; j < 4; ++j) four[j] = v[4 * k + j] * inv;
      if (even) {
        if (i < m) put4(y + i, four);
      } else {
        UNROLL for (int j = 0; j < 4; ++j) if (i + j < m) put(y + i + j, four[j]);
      }
    }
  }
}

template <class T> DEVICE Scores<T> row_of(softmax_PARAMS(T)) {
  (void)y;
  // Division of 64 bits is slow.
  unsigned query = blockIdx.x % queries, head = blockIdx.x / queries % heads, batch = blockIdx.x / queries / heads;
  size_t at = blockIdx.x;
  Scores<T> row;
  row.from = x + at * m;
  row.plus = bias ? bias + batch * of_batch + head * of_head + query * of_query : nullptr;
  row.last = first < 0 ? m - 1 : static_cast<unsigned>(first) + query;
  row.begin = first >= 0 && own ? own[batch] : 0;
  row.prefix = prefix;
  row.scale = scale;
  return row;
}

// Rows of at most 4 numbers, or 32, for each thread. Few threads with many numbers each let more rows of a card's be under
// way at once, which is what hides the time that memory takes.
template <class T, int K> DEVICE void softmax_by(softmax_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  // Four numbers lie at a multiple of their size.
  bool even = m % 4 == 0 && (reinterpret_cast<size_t>(x) | reinterpret_cast<size_t>(y)) % (4 * sizeof(T)) == 0;
  softmax_kept<T, K>(row_of(softmax_ARGS), y + static_cast<size_t>(blockIdx.x) * m, m, even, scratch);
}

#define softmax_4_PARAMS(T) softmax_PARAMS(T)
#define softmax_4_ARGS softmax_ARGS
template <class T> DEVICE void softmax_4_body(softmax_PARAMS(T)) { softmax_by<T, 1>(softmax_ARGS); }
EACH(softmax_4)

#define softmax_32_PARAMS(T) softmax_PARAMS(T)
#define softmax_32_ARGS softmax_ARGS
template <class T> DEVICE void softmax_32_body(softmax_PARAMS(T)) { softmax_by<T, 8>(softmax_ARGS); }
EACH(softmax_32)

// Longer rows are read again at each pass.
template <class T> DEVICE void softmax_body(softmax_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  Scores<T> row = row_of(softmax_ARGS);
  T *to = y + static_cast<size_t>(blockIdx.x) * m;
  float top = block_max(scratch, [&](unsigned t) {
    float v = -INFINITY;
    for (unsigned i = t; i <= row.last; i += blockDim.x) v = fmaxf(v, score(row, i, get(row.from + i)));
    return v;
  });
  float base = top == -INFINITY ? 0.f : top;
  float sum = block_sum(scratch, [&](unsigned t) {
    float s = 0.f;
    for (unsigned i = t; i <= row.last; i += blockDim.x) s += expf(score(row, i, get(row.from + i)) - base);
    return s;
  });
  float inv = sum == 0.f ? 0.f : 1.f / sum;
  THREADS(t) {
    for (unsigned i = t; i < m; i += blockDim.x)
      put(to + i, i > row.last ? 0.f : expf(score(row, i, get(row.from + i)) - base) * inv);
  }
}
EACH(softmax)

// dx = scale y (g - sum(g y)).
#define softmax_back_PARAMS(T) const T *y, const T *g, T *dx, unsigned m, float scale
#define softmax_back_ARGS y, g, dx, m, scale
template <class T> DEVICE void softmax_back_body(softmax_back_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  size_t row = static_cast<size_t>(blockIdx.x) * m;
  float c = block_sum(scratch, [&](unsigned t) {
    float s = 0.f;
    for (unsigned i = t; i < m; i += blockDim.x) s += get(g + row + i) * get(y + row + i);
    return s;
  });
  THREADS(t) {
    for (unsigned i = t; i < m; i += blockDim.x)
      put(dx + row + i, scale * get(y + row + i) * (get(g + row + i) - c));
  }
}
EACH(softmax_back)

// ---- What a convolution multiplies its weights with: columns [batch, channels * kh * kw, n], of n places of oh * ow
// from the first on. Outside of the
// picture [batch, channels, h, w] are zeros, or its border again; `relu` takes what is below zero for zero. A thread
// per place, a grid row per channel.

#define columns_PARAMS(T)                                                                                    \
  const T *x, T *y, unsigned planes, unsigned h, unsigned w, unsigned kernel, unsigned stride,               \
      unsigned padding, unsigned replicate, unsigned ow, unsigned relu, unsigned first, unsigned n
#define columns_ARGS x, y, planes, h, w, kernel, stride, padding, replicate, ow, relu, first, n
// SIDE is the kernel's, if it is known here, so that a place's taps stay in registers from plane to plane.
template <class T, int SIDE> DEVICE void columns_of(columns_PARAMS(T)) {
  THREADS(t) {
    unsigned i = blockIdx.x * blockDim.x + t, place = first + i;
    if (i < n) {
      int left = static_cast<int>(place % ow * stride) - static_cast<int>(padding);
      int above = static_cast<int>(place / ow * stride) - static_cast<int>(padding);
      int last_x = static_cast<int>(w) - 1, last_y = static_cast<int>(h) - 1;
      int side = SIDE ? SIDE : static_cast<int>(kernel);
      // Where in a plane a tap lies, or -1.
      auto tap = [&](int ky, int kx) {
        int px = left + kx, py = above + ky;
        if (replicate) {
          px = px < 0 ? 0 : px > last_x ? last_x : px;
          py = py < 0 ? 0 : py > last_y ? last_y : py;
        }
        bool inside = px >= 0 && py >= 0 && px <= last_x && py <= last_y;
        return inside ? py * static_cast<int>(w) + px : -1;
      };
      auto see = [&](const T *from, int at) {
        float v = at < 0 ? 0.f : get(from + at);
        return relu && v < 0.f ? 0.f : v;
      };
      int taps[SIDE ? SIDE * SIDE : 1];
      UNROLL for (int k = 0; k < SIDE * SIDE; ++k) taps[k] = tap(k / (SIDE ? SIDE : 1), k % (SIDE ? SIDE : 1));
      for (unsigned plane = blockIdx.y; plane < planes; plane += gridDim.y) {
        const T *from = x + static_cast<size_t>(plane) * h * w;
        T *to = y + static_cast<size_t>(plane) * side * side * n + i;
        if (SIDE) {
          UNROLL for (int k = 0; k < SIDE * SIDE; ++k) put(to + static_cast<size_t>(k) * n, see(from, taps[k]));
        } else {
          for (int ky = 0; ky < side; ++ky)
            for (int kx = 0; kx < side; ++kx, to += n) put(to, see(from, tap(ky, kx)));
        }
      }
    }
  }
}

template <class T> DEVICE void columns_body(columns_PARAMS(T)) {
  if (kernel == 3)
    columns_of<T, 3>(columns_ARGS);
  else
    columns_of<T, 0>(columns_ARGS);
}
EACH(columns)

// ---- Planes [.., h, w] resampled to [.., oh, ow]: each row and column of the result is a weighted sum of few of what
// was. Of both, `starts` says where the sums' parts begin (one more than there are sums), `index` of what each part is,
// `weight` how much. A thread per number.

#define resize_PARAMS(T)                                                                                     \
  const T *x, T *y, unsigned planes, unsigned h, unsigned w, unsigned oh, unsigned ow,                       \
      const unsigned *row_starts, const unsigned *row_index, const float *row_weight,                        \
      const unsigned *starts, const unsigned *index, const float *weight
#define resize_ARGS x, y, planes, h, w, oh, ow, row_starts, row_index, row_weight, starts, index, weight
template <class T> DEVICE void resize_body(resize_PARAMS(T)) {
  THREADS(t) {
    unsigned at = blockIdx.x * blockDim.x + t;
    if (at < oh * ow) {
      unsigned i = at / ow, j = at % ow;
      for (unsigned plane = blockIdx.y; plane < planes; plane += gridDim.y) {
        const T *from = x + static_cast<size_t>(plane) * h * w;
        float sum = 0.f;
        for (unsigned r = row_starts[i]; r < row_starts[i + 1]; ++r) {
          const T *row = from + static_cast<size_t>(row_index[r]) * w;
          float part = 0.f;
          for (unsigned c = starts[j]; c < starts[j + 1]; ++c) part += weight[c] * get(row + index[c]);
          sum += row_weight[r] * part;
        }
        put(y + static_cast<size_t>(plane) * oh * ow + at, sum);
      }
    }
  }
}
EACH(resize)

// ---- Multi-scale deformable attention (Zhu et al. 2021, eq. 3).
// value [batch, tokens, heads, dim], place [batch, queries, heads, levels, points, 2] in 0..1, mass without
// the 2; `shapes` holds height, width and first token of each level. What lies outside reads as zero.

struct Corners {
  int at[4];
  float share[4];
  // By how much the shares change as the place moves one picture to the right, and down.
  float right[4], down[4];
};

DEVICE void corners_of(float px, float py, int h, int w, int first, Corners *c) {
  float x = px * w - 0.5f, y = py * h - 0.5f;
  float x0 = floorf(x), y0 = floorf(y), fx = x - x0, fy = y - y0;
  for (int k = 0; k < 4; ++k) {
    int dx = k & 1, dy = k >> 1;
    float cx = x0 + dx, cy = y0 + dy;
    bool inside = cx >= 0.f && cy >= 0.f && cx < w && cy < h;
    float sx = dx ? fx : 1.f - fx, sy = dy ? fy : 1.f - fy;
    c->at[k] = inside ? first + static_cast<int>(cy) * w + static_cast<int>(cx) : -1;
    c->share[k] = sx * sy;
    c->right[k] = (dx ? sy : -sy) * w;
    c->down[k] = (dy ? sx : -sx) * h;
  }
}

// What a reader's points see of W channels. `v` is the first of them in the first token.
template <class T, int W>
DEVICE void read_points(const T *v, const T *place, const T *mass, const unsigned *shapes, size_t sample, unsigned width,
                        unsigned levels, unsigned points, T *y) {
  float sum[W] = {};
  for (unsigned l = 0; l < levels; ++l) {
    int h = shapes[3 * l], w = shapes[3 * l + 1], first = shapes[3 * l + 2];
#ifdef __CUDACC__
#pragma unroll 4
#endif
    for (unsigned p = 0; p < points; ++p) {
      size_t at = sample + l * points + p;
      Corners k;
      corners_of(get(place + 2 * at), get(place + 2 * at + 1), h, w, first, &k);
      float m = get(mass + at);
      for (int q = 0; q < 4; ++q) {
        if (k.at[q] < 0) continue;
        float four[4], share = m * k.share[q];
        const T *from = v + static_cast<size_t>(k.at[q]) * width;
        if (W == 4)
          get4(from, four);
        else
          four[0] = get(from);
        for (int i = 0; i < W; ++i) sum[i] += share * four[i];
      }
    }
  }
  for (int i = 0; i < W; ++i) put(y + i, sum[i]);
}

// A thread per `by` output numbers, 4 or 1; 4 only where dim is a multiple of it.
#define msda_PARAMS(T)                                                                                       \
  const T *value, const T *place, const T *mass, const unsigned *shapes, T *y, unsigned n, unsigned tokens,  \
      unsigned queries, unsigned heads, unsigned dim, unsigned levels, unsigned points, unsigned by
#define msda_ARGS value, place, mass, shapes, y, n, tokens, queries, heads, dim, levels, points, by
template <class T> DEVICE void msda_body(msda_PARAMS(T)) {
  THREADS(t) {
    unsigned i = (blockIdx.x * blockDim.x + t) * by;
    if (i < n) {
      unsigned c = i % dim, reader = i / dim; // (batch, query, head)
      size_t batch = reader / heads / queries, sample = static_cast<size_t>(reader) * levels * points;
      const T *v = value + (batch * tokens * heads + reader % heads) * dim + c;
      if (by == 4)
        read_points<T, 4>(v, place, mass, shapes, sample, heads * dim, levels, points, y + i);
      else
        read_points<T, 1>(v, place, mass, shapes, sample, heads * dim, levels, points, y + i);
    }
  }
}
EACH(msda)

// The largest |x|, as the bits of an f32, which order as the numbers do; not a number is above all. `most` is zero at
// first.
#define largest_PARAMS(T) const T *x, unsigned *most, size_t n
#define largest_ARGS x, most, n
template <class T> DEVICE void largest_body(largest_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  float top = block_reduce(
      scratch, 0.f,
      [&](unsigned t) {
        float m = 0.f;
        for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + t; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
          float v = fabsf(get(x + i));
          m = bits(v) > bits(m) ? v : m;
        }
        return m;
      },
      [](float a, float b) { return bits(a) > bits(b) ? a : b; });
  THREADS(t) {
    if (t == 0) take_most(most, bits(top));
  }
}
EACH(largest)

// Sums over readers are made of whole numbers where they have to be exact, so that the order does not matter. Of
// those that one token receives, two channels share 64 bits: the lower half is the even one's, and what it borrows
// is given back when they are parted. `scale` whole numbers make one.
DEVICE void add_pair(long long *p, float even, float odd) {
  add_whole(p, llrintf(odd) * (1ll << 32) + llrintf(even));
}
DEVICE long long of_pair(long long pair, unsigned odd) {
  long long even = static_cast<int>(static_cast<unsigned>(pair));
  return odd ? (pair - even) >> 32 : even;
}

// A power of two so large that no sum of numbers overflows `bits` bits, whose sizes add up to no more than a * b.
DEVICE float whole_scale(int bits, float a, float b) {
  if (!(a > 0.f) || !(b > 0.f) || !(a < 3e38f) || !(b < 3e38f)) return 1.f;
  int e = bits - static_cast<int>(ceilf(log2f(a) + log2f(b)));
  return exp2f(static_cast<float>(e < -120 ? -120 : e > 120 ? 120 : e));
}

// Of each token and head the masses of all readers between it and its neighbours to the right and below (or left of or
// above the picture's first ones), in whole numbers; `most` is the largest mass. What a token receives is at most the
// masses of four of them. A thread per reader, level and point.
#define msda_weights_PARAMS(T)                                                                               \
  const T *place, const T *mass, const unsigned *shapes, const float *most, long long *weights, unsigned n,  \
      unsigned tokens, unsigned queries, unsigned heads, unsigned levels, unsigned points
#define msda_weights_ARGS place, mass, shapes, most, weights, n, tokens, queries, heads, levels, points
template <class T> DEVICE void msda_weights_body(msda_weights_PARAMS(T)) {
  float scale = whole_scale(60, most[0], static_cast<float>(queries) * levels * points);
  THREADS(t) {
    unsigned i = blockIdx.x * blockDim.x + t;
    if (i < n) {
      unsigned l = i / points % levels, reader = i / points / levels, head = reader % heads;
      float h = shapes[3 * l], w = shapes[3 * l + 1];
      float x = floorf(get(place + 2 * static_cast<size_t>(i)) * w - 0.5f);
      float y = floorf(get(place + 2 * static_cast<size_t>(i) + 1) * h - 0.5f);
      if (x >= -1.f && y >= -1.f && x < w && y < h) {
        size_t token = shapes[3 * l + 2] + static_cast<unsigned>(fmaxf(y, 0.f)) * shapes[3 * l + 1]
            + static_cast<unsigned>(fmaxf(x, 0.f));
        size_t at = (static_cast<size_t>(reader / heads / queries) * tokens + token) * heads + head;
        // Rounded up, so that the sums bound what they stand for.
        add_whole(weights + at, llrintf(ceilf(fabsf(get(mass + i)) * scale)));
      }
    }
  }
}
EACH(msda_weights)

// Four times the largest of them as an f32, in most[1].
#define largest_weight_PARAMS(T) const long long *weights, float *most, size_t n, float terms
#define largest_weight_ARGS weights, most, n, terms
template <class T> DEVICE void largest_weight_body(largest_weight_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  float top = block_max(scratch, [&](unsigned t) {
    float m = 0.f;
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + t; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x)
      m = fmaxf(m, static_cast<float>(weights[i]));
    return m;
  });
  float scale = whole_scale(60, most[0], terms);
  THREADS(t) {
    // A mass that is no number stays what the bound is.
    if (t == 0) take_most(reinterpret_cast<unsigned *>(most) + 1, bits(most[0] < 3e38f ? 4.f * top / scale : most[0]));
  }
}
EACH(largest_weight)

// Eight threads a reader. In fours: each has four channels of every 32 that follow each other, and adds them at once
// (which wants memory at multiples of four numbers). Exact: it has every eighth pair. Otherwise every eighth channel. What
// the eight add together lies together.
const unsigned READER_LANES = 8;
enum Adding { FOURS, PAIRS, SINGLES };

template <class T, class Sum, Adding BY>
DEVICE void msda_back_by(const T *value, const T *place, const T *mass, const unsigned *shapes, const T *g, float scale,
                         Sum *dvalue, T *dplace, T *dmass, unsigned readers, unsigned tokens, unsigned queries,
                         unsigned heads, unsigned dim, unsigned levels, unsigned points) {
  unsigned begin = blockIdx.x * (blockDim.x / READER_LANES), half = (dim + 1) / 2;
  for (unsigned l = 0; l < levels; ++l) {
    int h = shapes[3 * l], w = shapes[3 * l + 1], first = shapes[3 * l + 2];
    for (unsigned p = 0; p < points; ++p)
      // Sums over channels of g times the corner's value, weighed as mass and place need it.
      lane_sums<3, READER_LANES>(
          [&](unsigned t, float *sums) {
            unsigned reader = begin + t / READER_LANES, lane = t % READER_LANES;
            sums[0] = sums[1] = sums[2] = 0.f;
            if (reader >= readers) return;
            size_t sample = (static_cast<size_t>(reader) * levels + l) * points + p;
            Corners k;
            corners_of(get(place + 2 * sample), get(place + 2 * sample + 1), h, w, first, &k);
            size_t row = static_cast<size_t>(reader / heads / queries) * tokens * heads + reader % heads;
            const T *own = g + static_cast<size_t>(reader) * dim;
            float m = get(mass + sample) * scale;
            for (unsigned from = 0; from < dim; from += 4 * READER_LANES) {
              unsigned channel[4];
              for (unsigned i = 0; i < 4; ++i)
                channel[i] = from + (BY == FOURS ? 4 * lane + i
                        : BY == PAIRS ? i / 2 * 2 * READER_LANES + 2 * lane + i % 2
                                      : i * READER_LANES + lane);
              if (channel[0] >= dim) continue;
              float grad[4], read[4];
              auto four = [&](const T *x, float *v) {
                if (BY == FOURS)
                  get4(x + channel[0], v);
                else
                  for (unsigned i = 0; i < 4; ++i) v[i] = channel[i] < dim ? get(x + channel[i]) : 0.f;
              };
              four(own, grad);
              for (int q = 0; q < 4; ++q) {
                if (k.at[q] < 0) continue;
                size_t at = row + static_cast<size_t>(k.at[q]) * heads;
                four(value + at * dim, read);
                float dot = 0.f, add[4];
                for (int i = 0; i < 4; ++i) {
                  dot += grad[i] * read[i];
                  add[i] = grad[i] * m * k.share[q];
                }
                // Braces, as nvcc 13.0 drops the statement behind an `else` that is discarded without them.
                if constexpr (BY == FOURS) {
                  add_floats(dvalue + at * dim + channel[0], add);
                } else {
                  for (unsigned i = 0; i < 4; ++i) {
                    if (channel[i] >= dim) continue;
                    if constexpr (BY == PAIRS) {
                      if (i % 2 == 0) add_pair(dvalue + at * half + channel[i] / 2, add[i], add[i + 1]);
                    } else {
                      add_float(dvalue + at * dim + channel[i], add[i]);
                    }
                  }
                }
                sums[0] += k.share[q] * dot;
                sums[1] += k.right[q] * dot;
                sums[2] += k.down[q] * dot;
              }
            }
          },
          [&](unsigned member, const float *sums) {
            unsigned reader = begin + member;
            if (reader >= readers) return;
            size_t sample = (static_cast<size_t>(reader) * levels + l) * points + p;
            float m = get(mass + sample);
            put(dmass + sample, sums[0]);
            put(dplace + 2 * sample, m * sums[1]);
            put(dplace + 2 * sample + 1, m * sums[2]);
          });
  }
}

// Bits of a sum of whole numbers, of 31; the rest is for terms that round up.
const int PAIR_BITS = 30;

// `most` is the largest gradient, `weight[1]` the largest sum of masses at a token.
#define msda_back_PARAMS(T)                                                                                  \
  const T *value, const T *place, const T *mass, const unsigned *shapes, const T *g, const float *most,      \
      const float *weight, long long *dvalue, T *dplace, T *dmass, unsigned readers, unsigned tokens,        \
      unsigned queries, unsigned heads, unsigned dim, unsigned levels, unsigned points
#define msda_back_ARGS                                                                                       \
  value, place, mass, shapes, g, most, weight, dvalue, dplace, dmass, readers, tokens, queries, heads, dim,  \
      levels, points
template <class T> DEVICE void msda_back_body(msda_back_PARAMS(T)) {
  float scale = whole_scale(PAIR_BITS, most[0], weight[1]);
  msda_back_by<T, long long, PAIRS>(value, place, mass, shapes, g, scale, dvalue, dplace, dmass, readers, tokens, queries,
                                    heads, dim, levels, points);
}
EACH(msda_back)

#define msda_back_loose_PARAMS(T)                                                                            \
  const T *value, const T *place, const T *mass, const unsigned *shapes, const T *g, float *dvalue,          \
      T *dplace, T *dmass, unsigned readers, unsigned tokens, unsigned queries, unsigned heads, unsigned dim, \
      unsigned levels, unsigned points, unsigned fours
#define msda_back_loose_ARGS                                                                                 \
  value, place, mass, shapes, g, dvalue, dplace, dmass, readers, tokens, queries, heads, dim, levels, points, fours
template <class T> DEVICE void msda_back_loose_body(msda_back_loose_PARAMS(T)) {
  if (fours)
    msda_back_by<T, float, FOURS>(value, place, mass, shapes, g, 1.f, dvalue, dplace, dmass, readers, tokens, queries,
                                  heads, dim, levels, points);
  else
    msda_back_by<T, float, SINGLES>(value, place, mass, shapes, g, 1.f, dvalue, dplace, dmass, readers, tokens, queries,
                                    heads, dim, levels, points);
}
EACH(msda_back_loose)

// The n pairs of msda_back as what they stand for, rows of dim numbers.
#define from_pairs_PARAMS(T) const long long *x, const float *most, const float *weight, T *y, unsigned n, unsigned dim
#define from_pairs_ARGS x, most, weight, y, n, dim
template <class T> DEVICE void from_pairs_body(from_pairs_PARAMS(T)) {
  float scale = whole_scale(PAIR_BITS, most[0], weight[1]);
  // What was no number has left none behind.
  bool finite = most[0] < 3e38f && weight[1] < 3e38f;
  float inverse = finite ? 1.f / scale : NAN;
  unsigned half = (dim + 1) / 2;
  THREADS(t) {
    unsigned i = blockIdx.x * blockDim.x + t;
    if (i < n) {
      unsigned row = i / half, c = i % half * 2;
      long long pair = x[i];
      T *to = y + static_cast<size_t>(row) * dim + c;
      put(to, static_cast<float>(of_pair(pair, 0)) * inverse);
      if (c + 1 < dim) put(to + 1, static_cast<float>(of_pair(pair, 1)) * inverse);
    }
  }
}
EACH(from_pairs)

// ---- Attention of one new token per row over keys and values in a preallocated cache (split over keys
// as in Flash-Decoding, Dao et al. 2023). Grid (batch x kv_heads, splits); a block reads its share of
// the keys once for all query heads of the group. Each split leaves, per query head, its largest score, the
// sum of exponentials and the weighted sum of values, which decode_join puts together.
// `own[b]` is the row's first own key: keys from `prefix` up to it are padding.

const unsigned MOST_GROUP = 8, MOST_DIM = 256, KEYS = 64, KEY_LANES = 8;

#define decode_PARAMS(T)                                                                                     \
  const T *q, const T *keys, const T *values, const unsigned *own, float *stats, float *sums, unsigned len,  \
      size_t row_stride, unsigned kv_heads, unsigned group, unsigned dim, unsigned prefix, float scale
#define decode_ARGS q, keys, values, own, stats, sums, len, row_stride, kv_heads, group, dim, prefix, scale
struct DecodeRoom {
  float query[MOST_GROUP * MOST_DIM], sum[MOST_GROUP * MOST_DIM], score[MOST_GROUP * KEYS];
  float top[MOST_GROUP], total[MOST_GROUP], fade[MOST_GROUP];
};

template <class T, unsigned GROUP> DEVICE void decode_by(DecodeRoom &room, decode_PARAMS(T)) {
  float *query = room.query, *sum = room.sum, *score = room.score, *top = room.top, *total = room.total, *fade = room.fade;
  unsigned row = blockIdx.x / kv_heads, head = blockIdx.x % kv_heads, width = kv_heads * dim;
  const T *k = keys + row * row_stride + head * dim, *v = values + row * row_stride + head * dim;
  unsigned share = (len + gridDim.y - 1) / gridDim.y, first = own[row];
  unsigned from = blockIdx.y * share, to = from + share < len ? from + share : len;
  bool by_eights = dim % 8 == 0 && row_stride % 8 == 0;
  THREADS(t) {
    for (unsigned i = t; i < group * dim; i += blockDim.x) {
      query[i] = get(q + (static_cast<size_t>(row) * kv_heads + head) * group * dim + i) * scale;
      sum[i] = 0.f;
    }
    if (t < group) {
      top[t] = -INFINITY;
      total[t] = 0.f;
    }
  }
  SYNC;
  for (unsigned tile = from; tile < to; tile += KEYS) {
    unsigned n = tile + KEYS < to ? KEYS : to - tile;
    // The token itself is always seen, so that no row is empty.
    auto seen = [&](unsigned at) { return at < prefix || at >= first || at + 1 == len; };
    for (unsigned j0 = 0; j0 < n; j0 += blockDim.x / KEY_LANES)
      lane_sums<GROUP, KEY_LANES>(
          [&](unsigned t, float *dots) {
            unsigned j = j0 + t / KEY_LANES;
            for (unsigned h = 0; h < GROUP; ++h) dots[h] = 0.f;
            if (j >= n || !seen(tile + j)) return;
            const T *key = k + static_cast<size_t>(tile + j) * width;
            for (unsigned c = t % KEY_LANES * 8; c < dim; c += KEY_LANES * 8) {
              float values[8];
              if (by_eights)
                widen(eight(key + c), values);
              else
                for (unsigned i = 0; i < 8; ++i) values[i] = c + i < dim ? get(key + c + i) : 0.f;
              for (unsigned h = 0; h < GROUP; ++h)
                if (h < group)
                  for (unsigned i = 0; i < 8; ++i)
                    if (by_eights || c + i < dim) dots[h] += query[h * dim + c + i] * values[i];
            }
          },
          [&](unsigned key, const float *dots) {
            unsigned j = j0 + key;
            if (j < n)
              for (unsigned h = 0; h < GROUP; ++h)
                if (h < group) score[h * KEYS + j] = seen(tile + j) ? dots[h] : -INFINITY;
          });
    SYNC;
    THREADS(t) {
      if (t < group) {
        float m = top[t];
        for (unsigned j = 0; j < n; ++j) m = fmaxf(m, score[t * KEYS + j]);
        fade[t] = m == -INFINITY ? 0.f : expf(top[t] - m);
        top[t] = m;
      }
    }
    SYNC;
    THREADS(t) {
      for (unsigned i = t; i < group * n; i += blockDim.x) {
        unsigned h = i / n, j = i % n;
        float s = score[h * KEYS + j];
        score[h * KEYS + j] = s == -INFINITY ? 0.f : expf(s - top[h]);
      }
    }
    SYNC;
    THREADS(t) {
      if (t < group) {
        float s = total[t] * fade[t];
        for (unsigned j = 0; j < n; ++j) s += score[t * KEYS + j];
        total[t] = s;
      }
      for (unsigned c = t; c < dim; c += blockDim.x) {
        float s[GROUP];
        for (unsigned h = 0; h < GROUP; ++h) s[h] = h < group ? sum[h * dim + c] * fade[h] : 0.f;
#ifdef __CUDACC__
#pragma unroll 8
#endif
        for (unsigned j = 0; j < n; ++j) {
          float value = get(v + static_cast<size_t>(tile + j) * width + c);
          for (unsigned h = 0; h < GROUP; ++h)
            if (h < group) s[h] += score[h * KEYS + j] * value;
        }
        for (unsigned h = 0; h < GROUP; ++h)
          if (h < group) sum[h * dim + c] = s[h];
      }
    }
    SYNC;
  }
  // Per (row, head, member of the group, split): largest score and sum, and the weighted values.
  THREADS(t) {
    for (unsigned h = 0; h < group; ++h) {
      size_t part = (static_cast<size_t>(blockIdx.x) * group + h) * gridDim.y + blockIdx.y;
      if (t == 0) {
        stats[2 * part] = top[h];
        stats[2 * part + 1] = total[h];
      }
      for (unsigned c = t; c < dim; c += blockDim.x) sums[part * dim + c] = sum[h * dim + c];
    }
  }
}

template <class T> DEVICE void decode_body(decode_PARAMS(T)) {
  SHARED DecodeRoom room;
  // Loops of known length, so that the sums stay in registers.
  if (group == 1)
    decode_by<T, 1>(room, decode_ARGS);
  else if (group == 2)
    decode_by<T, 2>(room, decode_ARGS);
  else if (group <= 4)
    decode_by<T, 4>(room, decode_ARGS);
  else
    decode_by<T, MOST_GROUP>(room, decode_ARGS);
}
EACH(decode)

// A block per query head: the softmax over all splits.
#define decode_join_PARAMS(T) const float *stats, const float *sums, T *y, unsigned splits, unsigned dim
#define decode_join_ARGS stats, sums, y, splits, dim
template <class T> DEVICE void decode_join_body(decode_join_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  const float *own = stats + static_cast<size_t>(blockIdx.x) * splits * 2;
  const float *part = sums + static_cast<size_t>(blockIdx.x) * splits * dim;
  float top = block_max(scratch, [&](unsigned t) {
    float m = -INFINITY;
    for (unsigned s = t; s < splits; s += blockDim.x) m = fmaxf(m, own[2 * s]);
    return m;
  });
  // A split that has seen nothing has the weight exp(-inf).
  float total = block_sum(scratch, [&](unsigned t) {
    float sum = 0.f;
    for (unsigned s = t; s < splits; s += blockDim.x) sum += own[2 * s + 1] * expf(own[2 * s] - top);
    return sum;
  });
  THREADS(t) {
    for (unsigned c = t; c < dim; c += blockDim.x) {
      float sum = 0.f;
#ifdef __CUDACC__
#pragma unroll 4
#endif
      for (unsigned s = 0; s < splits; ++s) sum += part[static_cast<size_t>(s) * dim + c] * expf(own[2 * s] - top);
      put(y + static_cast<size_t>(blockIdx.x) * dim + c, sum / total);
    }
  }
}
EACH(decode_join)

// ---- A token of each row of logits: the first of the largest where the temperature is 0, else the one in whose
// share drawn[row] of the total weight exp((l - max) / temperature) falls, ids in order. f64 as on the processor,
// whose choices these are but for the last bits of the sums. What is no number is never drawn; id -1 where nothing
// can be. A block per row; a thread has a run of ids.

#define sample_PARAMS(T) const T *x, const double *drawn, double *out, unsigned vocab, double temperature
#define sample_ARGS x, drawn, out, vocab, temperature
template <class T> DEVICE void sample_body(sample_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  SHARED double weight[1024], plain[1024];
  const T *row = x + static_cast<size_t>(blockIdx.x) * vocab;
  // fmaxf passes over what is no number.
  float top = block_max(scratch, [&](unsigned t) {
    float m = -INFINITY;
    for (unsigned i = t; i < vocab; i += blockDim.x) m = fmaxf(m, get(row + i));
    return m;
  });
  unsigned share = (vocab + blockDim.x - 1) / blockDim.x;
  auto weigh = [&](float l) {
    if (temperature == 0.) return l == top ? 1. : 0.;
    return l == l ? exp((static_cast<double>(l) - top) / temperature) : 0.;
  };
  THREADS(t) {
    double w = 0., p = 0.;
    for (unsigned i = t * share; i < (t + 1) * share && i < vocab; ++i) {
      float l = get(row + i);
      w += weigh(l);
      p += l == l ? exp(static_cast<double>(l) - top) : 0.;
    }
    weight[t] = w;
    plain[t] = p;
  }
  SYNC;
  THREADS(t) {
    if (t == 0) {
      double total = 0., all = 0., left;
      for (unsigned s = 0; s < blockDim.x; ++s) {
        total += weight[s];
        all += plain[s];
      }
      left = temperature == 0. ? 0. : drawn[blockIdx.x] * total;
      // The run in which it falls; if rounding leads past the end, the last that has any weight.
      unsigned run = blockDim.x;
      double before = 0.;
      for (unsigned s = 0; s < blockDim.x; ++s)
        if (weight[s] > 0.) {
          run = s;
          before = left;
          if (left < weight[s]) break;
          left -= weight[s];
        }
      unsigned id = vocab;
      if (run < blockDim.x && top > -INFINITY)
        for (unsigned i = run * share; i < (run + 1) * share && i < vocab; ++i) {
          double w = weigh(get(row + i));
          if (!(w > 0.)) continue;
          id = i;
          before -= w;
          if (before < 0.) break;
        }
      double *to = out + 2 * static_cast<size_t>(blockIdx.x);
      to[0] = id < vocab ? id : -1.;
      to[1] = id < vocab ? static_cast<double>(get(row + id)) - top - log(all) : -INFINITY;
    }
  }
}
EACH(sample)

// ---- log softmax(logits)[target] of each row, and its gradient g (onehot - softmax): a block per row.

#define log_prob_PARAMS(T) const T *x, const unsigned *target, float *y, float *normaliser, unsigned vocab
#define log_prob_ARGS x, target, y, normaliser, vocab
template <class T> DEVICE void log_prob_body(log_prob_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  const T *row = x + static_cast<size_t>(blockIdx.x) * vocab;
  float top = block_max(scratch, [&](unsigned t) {
    float m = -INFINITY;
    for (unsigned i = t; i < vocab; i += blockDim.x) m = fmaxf(m, get(row + i));
    return m;
  });
  float sum = block_sum(scratch, [&](unsigned t) {
    float s = 0.f;
    for (unsigned i = t; i < vocab; i += blockDim.x) s += expf(get(row + i) - top);
    return s;
  });
  THREADS(t) {
    if (t == 0) {
      normaliser[blockIdx.x] = top + logf(sum);
      y[blockIdx.x] = get(row + target[blockIdx.x]) - (top + logf(sum));
    }
  }
}
EACH(log_prob)

#define log_prob_back_PARAMS(T)                                                                              \
  const T *x, const unsigned *target, const float *normaliser, const float *g, T *dx, unsigned vocab
#define log_prob_back_ARGS x, target, normaliser, g, dx, vocab
template <class T> DEVICE void log_prob_back_body(log_prob_back_PARAMS(T)) {
  size_t row = static_cast<size_t>(blockIdx.x) * vocab;
  float grad = g[blockIdx.x], z = normaliser[blockIdx.x];
  unsigned hit = target[blockIdx.x];
  THREADS(t) {
    for (unsigned i = t; i < vocab; i += blockDim.x)
      put(dx + row + i, grad * ((i == hit ? 1.f : 0.f) - expf(get(x + row + i) - z)));
  }
}
EACH(log_prob_back)

// ---- Rows that move: y's row i of a batch's `rows` is x's from[i] of its `sources`, or zeros. A block per row.

#define move_rows_PARAMS(T)                                                                                  \
  const T *x, const unsigned *from, T *y, unsigned sources, unsigned rows, unsigned dim
#define move_rows_ARGS x, from, y, sources, rows, dim
template <class T> DEVICE void move_rows_body(move_rows_PARAMS(T)) {
  unsigned source = from[blockIdx.x % rows];
  const T *row = x + (static_cast<size_t>(blockIdx.x / rows) * sources + source) * dim;
  T *to = y + static_cast<size_t>(blockIdx.x) * dim;
  THREADS(t) {
    for (unsigned c = t; c < dim; c += blockDim.x) put(to + c, source < sources ? get(row + c) : 0.f);
  }
}
EACH(move_rows)

// ---- Dropout (Srivastava et al. 2014): element i stays, times `scale`, where the i-th number of SplitMix64 (Steele et
// al. 2014) from `seed` is `least` or more of 2^32. Forward and backward are the same.

#define dropout_PARAMS(T) const T *x, T *y, size_t n, size_t seed, unsigned least, float scale
#define dropout_ARGS x, y, n, seed, least, scale
template <class T> DEVICE void dropout_body(dropout_PARAMS(T)) {
  THREADS(t) {
    size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + t;
    if (i < n) {
      size_t z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
      z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
      z = (z ^ z >> 27) * 0x94d049bb133111ebull;
      unsigned drawn = static_cast<unsigned>((z ^ z >> 31) >> 32);
      put(y + i, drawn < least ? 0.f : get(x + i) * scale);
    }
  }
}
EACH(dropout)

// ---- The optimiser. Gradients are added up in f32, in place of what was there where `first`.

#define add_gradient_PARAMS(T) const T *g, float *sum, size_t n, float weight, unsigned first
#define add_gradient_ARGS g, sum, n, weight, first
template <class T> DEVICE void add_gradient_body(add_gradient_PARAMS(T)) {
  THREADS(t) {
    size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + t;
    if (i < n) sum[i] = (first ? 0.f : sum[i]) + get(g + i) * weight;
  }
}
EACH(add_gradient)

// A block's share of the sum of squares.
#define sum_squares_PARAMS(T) const T *x, double *partial, size_t n
#define sum_squares_ARGS x, partial, n
template <class T> DEVICE void sum_squares_body(sum_squares_PARAMS(T)) {
  SHARED float scratch[MOST_WARPS];
  size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  float sum = block_sum(scratch, [&](unsigned t) {
    float s = 0.f;
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + t; i < n; i += step) s += get(x + i) * get(x + i);
    return s;
  });
  THREADS(t) {
    if (t == 0) partial[blockIdx.x] = sum;
  }
}
EACH(sum_squares)

// AdamW (Loshchilov & Hutter 2019): nn::optim has the rule and its numbers. The weights in full are `master`, where
// there is one.
#define adamw_PARAMS(T)                                                                                      \
  T *w, float *master, float *m, float *v, const float *g, size_t n, float clip, float beta1, float beta2,   \
      float keep, float step, float root, float eps
#define adamw_ARGS w, master, m, v, g, n, clip, beta1, beta2, keep, step, root, eps
template <class T> DEVICE void adamw_body(adamw_PARAMS(T)) {
  THREADS(t) {
    size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + t;
    if (i < n) {
      float grad = g[i] * clip;
      float first = beta1 * m[i] + (1.f - beta1) * grad, second = beta2 * v[i] + (1.f - beta2) * grad * grad;
      float weight = (master ? master[i] : get(w + i)) * keep - step * first / (sqrtf(second * root) + eps);
      m[i] = first;
      v[i] = second;
      if (master) master[i] = weight;
      put(w + i, weight);
    }
  }
}
EACH(adamw)
