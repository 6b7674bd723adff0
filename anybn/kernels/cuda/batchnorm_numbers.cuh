// Types of values, arithmetic with its rounding errors, sums of tiles.

// Whether float64 has half of float32's rate, as on the large GPUs of compute capability 6.0, 7.0, 8.0, 9.0 and 10.0, or
// a 32nd or a 64th of it. Where it is fast, float32 is computed in it, and so are all sums.
#ifndef FAST_DOUBLE
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 600 || __CUDA_ARCH__ == 700 || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
#define FAST_DOUBLE 1
#else
#define FAST_DOUBLE 0
#endif
#endif

// -- types ------------------------------------------------------------------------------------------------------------

struct float16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

/// What T is computed in.
template <class T>
struct Real {
  using type = float;
};
template <>
struct Real<double> {
  using type = double;
};

__device__ inline float value(float v) { return v; }
__device__ inline double value(double v) { return v; }
__device__ inline float value(float16 v) { return half_to_float(v.bits); }
__device__ inline float value(bfloat16 v) { return __int_as_float(static_cast<int>(v.bits) << 16); }

__device__ inline void round_to(float& out, float v) { out = v; }
__device__ inline void round_to(float& out, double v) { out = static_cast<float>(v); }
__device__ inline void round_to(double& out, double v) { out = v; }
__device__ inline void round_to(float16& out, float v) { out.bits = float_to_half(v); }
__device__ inline void round_to(bfloat16& out, float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#else
  unsigned bits = __float_as_int(v);
  out.bits = v != v ? 0x7FFF : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest even
#endif
}

#define MINUS_INFINITY __int_as_float(static_cast<int>(0xFF800000))
__device__ inline double at_least(double v, double floor) { return v <= floor ? floor : v; }  // keeps NaN

/// V values that are loaded and stored at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T v[V];
};

/// One of the values. Of two bfloat16 in a word, each is one instruction away; a compiler that thinks in halves takes two.
template <class T, int V>
__device__ inline auto value(const Vector<T, V>& of, int j) {
  return value(of.v[j]);
}
template <int V>
__device__ inline float value(const Vector<bfloat16, V>& of, int j) {
  if (V == 1) return value(of.v[0]);
  unsigned word;
  memcpy(&word, &of.v[j / 2 * 2], sizeof word);
  return __int_as_float(static_cast<int>(j % 2 ? word & 0xFFFF0000u : word << 16));
}

/// Rounds V values; 16 bits in pairs, which takes one instruction.
template <class T, int V, class R>
__device__ inline void round_all(Vector<T, V>& out, const R* v) {
#pragma unroll
  for (int j = 0; j < V; ++j) round_to(out.v[j], v[j]);
}
#if !defined(CUDA_ON_CPU) && __CUDA_ARCH__ >= 800
template <int V>
__device__ inline void round_all(Vector<bfloat16, V>& out, const float* v) {
#pragma unroll
  for (int j = 0; j + 1 < V; j += 2) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v[j + 1]), "f"(v[j]));
    reinterpret_cast<unsigned*>(&out)[j / 2] = pair;
  }
  if (V == 1) round_to(out.v[0], v[0]);
}
template <int V>
__device__ inline void round_all(Vector<float16, V>& out, const float* v) {
#pragma unroll
  for (int j = 0; j + 1 < V; j += 2) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v[j + 1]), "f"(v[j]));
    reinterpret_cast<unsigned*>(&out)[j / 2] = pair;
  }
  if (V == 1) round_to(out.v[0], v[0]);
}
#endif

// Parameters have a type of their own, told apart at run time: once per channel is not often.
enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };

__device__ inline double parameter(const void* p, int type, long long i, double otherwise) {
  if (!p) return otherwise;
  if (type == FLOAT16) return value(static_cast<const float16*>(p)[i]);
  if (type == BFLOAT16) return value(static_cast<const bfloat16*>(p)[i]);
  if (type == FLOAT32) return static_cast<const float*>(p)[i];
  return static_cast<const double*>(p)[i];
}

__device__ inline void set_parameter(void* p, int type, long long i, double v) {
  if (!p) return;
  if (type == FLOAT16) round_to(static_cast<float16*>(p)[i], static_cast<float>(v));
  if (type == BFLOAT16) round_to(static_cast<bfloat16*>(p)[i], static_cast<float>(v));
  if (type == FLOAT32) static_cast<float*>(p)[i] = static_cast<float>(v);
  if (type == FLOAT64) static_cast<double*>(p)[i] = v;
}

// -- arithmetic with its rounding errors ------------------------------------------------------------------------------

/// The unevaluated sum hi + lo.
template <class R>
struct Pair {
  R hi, lo;
};

__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }

template <class R>
__device__ inline Pair<R> two_sum(R a, R b) {
  R s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}
template <class R>
__device__ inline Pair<R> two_prod(R a, R b) {
  R p = a * b;
  return {p, fused(a, b, -p)};
}
__device__ inline Pair<float> split(double v) {
  float hi = static_cast<float>(v);
  return {hi, static_cast<float>(v - hi)};
}

/// Adds v to a sum that keeps what rounding takes from it.
template <class R>
__device__ inline void add(Pair<R>& sum, R v) {
  Pair<R> s = two_sum(sum.hi, v);
  sum = {s.hi, sum.lo + s.lo};
}

/// Sums of tiles: float64 for float32 values, a pair of float64 for float64 values.
template <class R>
struct Wide {
  using type = double;
};
template <>
struct Wide<double> {
  using type = Pair<double>;
};
using Pair64 = Pair<double>;

__device__ inline Pair64 operator+(Pair64 a, Pair64 b) {
  Pair64 s = two_sum(a.hi, b.hi);
  return two_sum(s.hi, s.lo + (a.lo + b.lo));
}
__device__ inline Pair64 operator-(Pair64 a, Pair64 b) { return a + Pair64{-b.hi, -b.lo}; }
__device__ inline Pair64 operator*(Pair64 a, Pair64 b) {
  Pair64 p = two_prod(a.hi, b.hi);
  return two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}
__device__ inline Pair64 operator*(Pair64 a, double b) { return a * Pair64{b, 0.0}; }

__device__ inline double wide(float a) { return a; }
__device__ inline double wide(Pair<float> a) { return static_cast<double>(a.hi) + a.lo; }
__device__ inline Pair64 wide(double a) { return {a, 0.0}; }
__device__ inline Pair64 wide(Pair64 a) { return two_sum(a.hi, a.lo); }
__device__ inline double difference(float a, float b) { return static_cast<double>(a) - b; }
__device__ inline Pair64 difference(double a, double b) { return two_sum(a, -b); }
__device__ inline Pair64 as_pair(double a) { return {a, 0.0}; }
__device__ inline Pair64 as_pair(Pair64 a) { return a; }

__device__ inline double shuffled(double v, int offset) { return __shfl_xor_sync(~0u, v, offset); }
__device__ inline Pair64 shuffled(Pair64 v, int offset) { return {shuffled(v.hi, offset), shuffled(v.lo, offset)}; }
__device__ inline void add_rank(double& sum, const double* p, int rank) { sum = sum + of_rank(p, rank); }
__device__ inline void add_rank(Pair64& sum, const Pair64* p, int rank) {
  sum = sum + Pair64{of_rank(&p->hi, rank), of_rank(&p->lo, rank)};
}

/// The two sums of a channel: of x - origin and its square, or of dy and dy * (x - mean).
template <class W>
struct alignas(16) Sums {
  W s1, s2;
  __device__ void operator+=(const Sums& other) {
    s1 = s1 + other.s1;
    s2 = s2 + other.s2;
  }
};

/// Of the lanes of a warp, in a fixed order; every lane gets it.
template <class W>
__device__ inline Sums<W> sum_warp(Sums<W> sums) {
  for (int offset = 16; offset > 0; offset /= 2) sums += {shuffled(sums.s1, offset), shuffled(sums.s2, offset)};
  return sums;
}

/// Adds the first `valid` of `pair(k)`, k < K, in float64: of a and b, a and b * a. In two chains where there are many, so
/// that fewer additions wait for one another.
template <int K, class Pairs>
__device__ inline void add_pairs(Sums<double>& total, int valid, const Pairs& pair) {
  constexpr int SECOND = K >= 16 ? K / 2 : K;
  Sums<double> sums = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= valid) continue;
    const Pair64 p = pair(k);
    if (k < SECOND) {
      total = {total.s1 + p.hi, fma(p.hi, p.lo, total.s2)};
    } else if (k == SECOND) {
      sums = {p.hi, p.hi * p.lo};
    } else {
      sums = {sums.s1 + p.hi, fma(p.hi, p.lo, sums.s2)};
    }
  }
  if (SECOND < K) total += sums;
}

/// True if float32 sums of this size are neither overflowing nor so small that squares lose digits.
__device__ inline bool safe(float sum) { return fabsf(sum) < 1e30f; }
__device__ inline bool safe(double) { return true; }  // nothing is wider
__device__ inline bool safe_square(float sum) { return sum < 1e30f && sum > 1e-25f; }
__device__ inline bool safe_square(double) { return true; }

/// The one in the middle.
template <class R>
__device__ inline R median(R a, R b, R c) {
  const R low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c < high ? c : high;
}

/// Adds a tile, values[k * STRIDE] for k < K of which the first `valid` count and the others repeat the first.
///
/// Deviations are taken from one of the values, so that they are exact on exact data and small wherever the mean is.
/// The sum of the values is exact; sums about the tile's origin become sums about the channel's in the wide type. Where
/// squares overflow or vanish, or where the tile's origin lies so far out that most of them cancels, the tile is added
/// value by value in the wide type, which is slow and rare. So is every tile if it is to be `exact`: else the squares
/// have float32's rounding errors. They average out in many values, except where all are multiples of one power of two,
/// whose squares round up more often than down: 2^-25 of the sum has been seen.
///
/// NARROW values have 16 bits. Of few of them, float32 takes deviations and their sum as well as they are wanted.
template <int K, int STRIDE, bool NARROW, class R, class W>
__device__ inline void add_tile(Sums<W>& total, const R* values, int valid, R origin, bool exact) {
  // The middle of three, so that one value far out is not taken; the first where there are others that repeat it.
  const R center = median(values[0], values[K / 2 * STRIDE], values[(K - 1) * STRIDE]);
  Pair<R> sum = {R(0), R(0)};  // of the values, or of NARROW ones' deviations
  R squares = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const R v = values[k * STRIDE], d = v - center;
    if (NARROW) {
      sum.hi += d;
    } else {
      add(sum, v);
    }
    squares = fused(d, d, squares);
  }
  const R of_center = NARROW ? R(0) : center;
  // s1^2 / (squares * valid) is the part of the squares that cancels.
  const R s1_here = (sum.hi - of_center * R(K)) + sum.lo, cancelling = valid < K ? R(0.75) : R(0.875);
  if (!exact && safe(sum.hi) && safe_square(squares) && s1_here * s1_here <= squares * (cancelling * R(valid))) {
    const W s1 = wide(sum) - wide(of_center) * R(K), shift = difference(center, origin);
    const W there = s1 + shift * double(valid);
    total.s1 = total.s1 + there;
    total.s2 = total.s2 + wide(squares) + shift * (s1 + there);
    return;
  }
  bool constant = true;
#pragma unroll
  for (int k = 0; k < K; ++k) constant = constant && values[k * STRIDE] == center;
  if (constant) {  // no rarity: zeros behind a relu
    const W shift = difference(center, origin), there = shift * double(valid);
    total.s1 = total.s1 + there;
    total.s2 = total.s2 + shift * there;
    return;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k < valid) {
      const W d = difference(values[k * STRIDE], origin);
      total.s1 = total.s1 + d;
      total.s2 = total.s2 + d * d;
    }
  }
}

/// Adds sum(dy) and sum(dy * (x - mean)) of a tile; dy is 0 where there is nothing to add.
template <int K, int STRIDE, bool NARROW, class R, class W>
__device__ inline void add_gradient_tile(Sums<W>& total, const R* dy, const R* x, R mean) {
  Pair<R> s1 = {R(0), R(0)}, s2 = {R(0), R(0)};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const R g = dy[k * STRIDE];
    if (NARROW) {
      s1.hi += g;
      s2.hi = fused(g, x[k * STRIDE] - mean, s2.hi);
      continue;
    }
    const Pair<R> d = two_sum(x[k * STRIDE], -mean), p = two_prod(g, d.hi);
    add(s1, g);
    add(s2, p.hi);
    s2.lo += p.lo + g * d.lo;
  }
  if (safe(s1.hi) && safe(s2.hi)) {
    total.s1 = total.s1 + wide(s1);
    total.s2 = total.s2 + wide(s2);
    return;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    total.s1 = total.s1 + wide(dy[k * STRIDE]);
    total.s2 = total.s2 + wide(dy[k * STRIDE]) * difference(x[k * STRIDE], mean);
  }
}
