// valor's CUDA kernels: what candle has no kernel for, or none with a backward pass.
//
// Each body is written in phases. THREADS(t) runs what follows for every thread of the block and SYNC
// ends a phase; nothing that one thread knows outlives a phase but in shared memory. So the same text
// compiles as C++ on the host (see the second half of the macros), where a test runs every kernel
// against the processor's own ops: a machine without a GPU proves all but the launch.
//
// Numbers are computed in f32 whatever their type in memory. Grids are (x, y); blocks are one row of
// threads, a power of two of them. No kernel here depends on the order in which threads run: sums are
// trees or, where many blocks add to one place, integers.

#include <math.h>
#include <stddef.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define THREADS(t) for (unsigned t = threadIdx.x, once_ = 1; once_; once_ = 0)
#define SYNC __syncthreads()
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
#else
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
#define DEFINE(name, type, T)                                                                                \
  extern "C" void name##_##type(unsigned columns, unsigned rows, unsigned threads, void **args) {            \
    every_block(&name##_body<T>, columns, rows, threads, args);                                              \
  }
#define EACH(name) DEFINE(name, f32, float)

DEVICE float get(const float *p) { return *p; }
DEVICE void put(float *p, float v) { *p = v; }
DEVICE void add_whole(long long *p, long long v) { *p += v; }
#endif

// The sum of f(t) over the block's threads, to all of them. `scratch` holds a number per thread.
template <class F> DEVICE float block_sum(float *scratch, F f) {
  THREADS(t) { scratch[t] = f(t); }
  SYNC;
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    THREADS(t) {
      if (t < n) scratch[t] += scratch[t + n];
    }
    SYNC;
  }
  float sum = scratch[0];
  SYNC;
  return sum;
}

const unsigned MOST_THREADS = 1024;

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
  SHARED float scratch[MOST_THREADS];
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
  SHARED float scratch[MOST_THREADS];
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
  SHARED float scratch[MOST_THREADS];
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
  SHARED float scratch[MOST_THREADS];
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
  size_t token = blockIdx.x, angle = (token % period) * half;
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

// A thread per output number.
#define msda_PARAMS(T)                                                                                       \
  const T *value, const T *place, const T *mass, const unsigned *shapes, T *y, size_t n, unsigned tokens,    \
      unsigned queries, unsigned heads, unsigned dim, unsigned levels, unsigned points
#define msda_ARGS value, place, mass, shapes, y, n, tokens, queries, heads, dim, levels, points
template <class T> DEVICE void msda_body(msda_PARAMS(T)) {
  THREADS(t) {
    size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + t;
    if (i < n) {
      unsigned c = i % dim;
      size_t reader = i / dim; // (batch, query, head)
      unsigned head = reader % heads;
      size_t batch = reader / heads / queries, sample = reader * levels * points;
      const T *v = value + (batch * tokens * heads + head) * dim + c;
      float sum = 0.f;
      for (unsigned l = 0; l < levels; ++l)
        for (unsigned p = 0; p < points; ++p, ++sample) {
          Corners k;
          const unsigned *s = shapes + 3 * l;
          corners_of(get(place + 2 * sample), get(place + 2 * sample + 1), s[0], s[1], s[2], &k);
          float read = 0.f;
          for (int q = 0; q < 4; ++q)
            if (k.at[q] >= 0) read += k.share[q] * get(v + static_cast<size_t>(k.at[q]) * heads * dim);
          sum += get(mass + sample) * read;
        }
      put(y + i, sum);
    }
  }
}
EACH(msda)

// Of a whole number to add up: a power of two so large that no sum of `terms` terms of at most
// `most` overflows 63 bits.
DEVICE float whole_scale(float most, float terms) {
  if (!(most > 0.f) || !(most < 3e38f)) return 1.f;
  int e = 60 - static_cast<int>(ceilf(log2f(most))) - static_cast<int>(ceilf(log2f(terms)));
  return exp2f(static_cast<float>(e < -120 ? -120 : e > 120 ? 120 : e));
}

// A block per reader, a thread per channel in turn. The value's gradient is added up in whole numbers,
// `most[0]` being the largest gradient, `most[1]` the largest mass.
#define msda_back_PARAMS(T)                                                                                  \
  const T *value, const T *place, const T *mass, const unsigned *shapes, const T *g, const float *most,      \
      long long *dvalue, T *dplace, T *dmass, unsigned tokens, unsigned queries, unsigned heads,             \
      unsigned dim, unsigned levels, unsigned points
#define msda_back_ARGS                                                                                       \
  value, place, mass, shapes, g, most, dvalue, dplace, dmass, tokens, queries, heads, dim, levels, points
template <class T> DEVICE void msda_back_body(msda_back_PARAMS(T)) {
  SHARED float scratch[MOST_THREADS];
  size_t reader = blockIdx.x;
  unsigned head = reader % heads;
  size_t batch = reader / heads / queries, sample = reader * levels * points;
  size_t first = (batch * tokens * heads + head) * dim;
  float scale = whole_scale(most[0] * most[1], static_cast<float>(queries) * levels * points);
  for (unsigned l = 0; l < levels; ++l)
    for (unsigned p = 0; p < points; ++p, ++sample) {
      Corners k;
      const unsigned *s = shapes + 3 * l;
      corners_of(get(place + 2 * sample), get(place + 2 * sample + 1), s[0], s[1], s[2], &k);
      float m = get(mass + sample);
      // Sums over channels of g times the corner's value: all that place and mass need.
      float read[4];
      for (int q = 0; q < 4; ++q) {
        if (k.at[q] < 0) {
          read[q] = 0.f;
          continue;
        }
        size_t at = first + static_cast<size_t>(k.at[q]) * heads * dim;
        read[q] = block_sum(scratch, [&](unsigned t) {
          float sum = 0.f;
          for (unsigned c = t; c < dim; c += blockDim.x) {
            float grad = get(g + reader * dim + c);
            add_whole(dvalue + at + c, llrintf(grad * m * k.share[q] * scale));
            sum += grad * get(value + at + c);
          }
          return sum;
        });
      }
      THREADS(t) {
        if (t == 0) {
          float dm = 0.f, dx = 0.f, dy = 0.f;
          for (int q = 0; q < 4; ++q) {
            dm += k.share[q] * read[q];
            dx += k.right[q] * read[q];
            dy += k.down[q] * read[q];
          }
          put(dmass + sample, dm);
          put(dplace + 2 * sample, m * dx);
          put(dplace + 2 * sample + 1, m * dy);
        }
      }
    }
}
EACH(msda_back)

// The whole numbers of msda_back as what they stand for.
#define from_whole_PARAMS(T) const long long *x, const float *most, T *y, size_t n, float terms
#define from_whole_ARGS x, most, y, n, terms
template <class T> DEVICE void from_whole_body(from_whole_PARAMS(T)) {
  float scale = whole_scale(most[0] * most[1], terms);
  THREADS(t) {
    size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + t;
    // What was no number has left none behind.
    float whole = most[0] * most[1] < 3e38f ? static_cast<float>(static_cast<double>(x[i]) / scale) : NAN;
    if (i < n) put(y + i, whole);
  }
}
EACH(from_whole)

// ---- Attention of one new token per row over keys and values in a preallocated cache (split over keys
// as in Flash-Decoding, Dao et al. 2023). Grid (batch x kv_heads, splits); a block reads its share of
// the keys once for all query heads of the group. Each split leaves, per query head, its largest score, the
// sum of exponentials and the weighted sum of values, which decode_join puts together.
// `own[b]` is the row's first own key: keys from `prefix` up to it are padding.

const unsigned MOST_GROUP = 8, MOST_DIM = 256, KEYS = 128;

#define decode_PARAMS(T)                                                                                     \
  const T *q, const T *keys, const T *values, const unsigned *own, float *partial, unsigned len,             \
      size_t row_stride, unsigned kv_heads, unsigned group, unsigned dim, unsigned prefix, float scale
#define decode_ARGS q, keys, values, own, partial, len, row_stride, kv_heads, group, dim, prefix, scale
template <class T> DEVICE void decode_body(decode_PARAMS(T)) {
  SHARED float query[MOST_GROUP * MOST_DIM], sum[MOST_GROUP * MOST_DIM], score[MOST_GROUP * KEYS];
  SHARED float top[MOST_GROUP], total[MOST_GROUP], fade[MOST_GROUP];
  unsigned row = blockIdx.x / kv_heads, head = blockIdx.x % kv_heads, width = kv_heads * dim;
  const T *k = keys + row * row_stride + head * dim, *v = values + row * row_stride + head * dim;
  unsigned share = (len + gridDim.y - 1) / gridDim.y, first = own[row];
  unsigned from = blockIdx.y * share, to = from + share < len ? from + share : len;
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
    THREADS(t) {
      for (unsigned j = t; j < n; j += blockDim.x) {
        unsigned at = tile + j;
        // The token itself is always seen, so that no row is empty.
        bool seen = at < prefix || at >= first || at + 1 == len;
        float dots[MOST_GROUP];
        // Loops of fixed length, so that the sums stay in registers.
        for (unsigned h = 0; h < MOST_GROUP; ++h) dots[h] = 0.f;
        if (seen)
          for (unsigned c = 0; c < dim; ++c) {
            float key = get(k + static_cast<size_t>(at) * width + c);
            for (unsigned h = 0; h < MOST_GROUP; ++h)
              if (h < group) dots[h] += query[h * dim + c] * key;
          }
        for (unsigned h = 0; h < MOST_GROUP; ++h)
          if (h < group) score[h * KEYS + j] = seen ? dots[h] : -INFINITY;
      }
    }
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
      for (unsigned i = t; i < group * dim; i += blockDim.x) {
        unsigned h = i / dim, c = i % dim;
        float s = sum[i] * fade[h];
        for (unsigned j = 0; j < n; ++j)
          s += score[h * KEYS + j] * get(v + static_cast<size_t>(tile + j) * width + c);
        sum[i] = s;
      }
    }
    SYNC;
  }
  // Per (row, head, member of the group, split): largest score, sum, then the weighted values.
  THREADS(t) {
    for (unsigned h = 0; h < group; ++h) {
      float *out =
          partial + ((static_cast<size_t>(blockIdx.x) * group + h) * gridDim.y + blockIdx.y) * (dim + 2);
      if (t == 0) {
        out[0] = top[h];
        out[1] = total[h];
      }
      for (unsigned c = t; c < dim; c += blockDim.x) out[2 + c] = sum[h * dim + c];
    }
  }
}
EACH(decode)

// A block per query head: the softmax over all splits.
#define decode_join_PARAMS(T) const float *partial, T *y, unsigned splits, unsigned dim
#define decode_join_ARGS partial, y, splits, dim
template <class T> DEVICE void decode_join_body(decode_join_PARAMS(T)) {
  const float *part = partial + static_cast<size_t>(blockIdx.x) * splits * (dim + 2);
  float top = -INFINITY, total = 0.f;
  for (unsigned s = 0; s < splits; ++s) top = fmaxf(top, part[s * (dim + 2)]);
  for (unsigned s = 0; s < splits; ++s)
    if (part[s * (dim + 2)] != -INFINITY) total += part[s * (dim + 2) + 1] * expf(part[s * (dim + 2)] - top);
  THREADS(t) {
    for (unsigned c = t; c < dim; c += blockDim.x) {
      float sum = 0.f;
      for (unsigned s = 0; s < splits; ++s) {
        const float *p = part + s * (dim + 2);
        if (p[0] != -INFINITY) sum += p[2 + c] * expf(p[0] - top);
      }
      put(y + static_cast<size_t>(blockIdx.x) * dim + c, sum / total);
    }
  }
}
EACH(decode_join)

// ---- log softmax(logits)[target] of each row, and its gradient g (onehot - softmax): a block per row.

#define log_prob_PARAMS(T) const T *x, const unsigned *target, float *y, float *normaliser, unsigned vocab
#define log_prob_ARGS x, target, y, normaliser, vocab
template <class T> DEVICE void log_prob_body(log_prob_PARAMS(T)) {
  SHARED float scratch[MOST_THREADS];
  const T *row = x + static_cast<size_t>(blockIdx.x) * vocab;
  THREADS(t) {
    float m = -INFINITY;
    for (unsigned i = t; i < vocab; i += blockDim.x) m = fmaxf(m, get(row + i));
    scratch[t] = m;
  }
  SYNC;
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    THREADS(t) {
      if (t < n) scratch[t] = fmaxf(scratch[t], scratch[t + n]);
    }
    SYNC;
  }
  float top = scratch[0];
  SYNC;
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
