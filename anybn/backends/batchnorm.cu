// Batch norm for CUDA arrays: training, evaluation and backward.
//
// x lies in memory as (n, channels, length). Channels-first arrays are *planes*, with length values of a channel side
// by side; channels-last and (N, C) arrays are *rows*, with length 1 and neighbouring channels side by side. A block
// works on one channel of planes, or on a few neighbouring channels of rows, and on one *part* of their positions. A
// position is a vector of V values: of one channel in planes, of V channels in rows.
//
//   train, backward                            one launch: a cluster of blocks per channel reads x into shared memory
//   sums, finish_train, evaluate               training in two passes over x, for channels too large for that
//   gradient_sums, finish_backward, gradients  backward, likewise
//   evaluate                                   evaluation
//   commit                                     the running statistics alone
//
// Every order of summation is fixed by the launch: the results are the same bits from run to run.
//
// Arithmetic. float64 is slow on many GPUs, so it is used per tile (the K values that a thread holds) and per channel;
// per value only where x is float64, where float32 overflows, and in arrays so small that it takes no time (`exact`).
// What float32 would lose is carried along as its rounding error: `two_sum` (Knuth 1969) and `two_prod` (Dekker 1971,
// with fma) are exact. So y and dx of float32 data are what float64 arithmetic gives from the same statistics, rounded
// once, but for about one value in a million. 16-bit data is normalized in plain float32. This must be compiled with
// --fmad=false: a contracted two_sum is not exact.

#ifndef CUDA_ON_CPU  // tests/cuda_cpu has its own of these
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic[];
  return dynamic;
}
__device__ inline float half_to_float(unsigned short bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
__device__ inline unsigned short float_to_half(float v) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
#if __CUDA_ARCH__ >= 900
#define CLUSTER_OF(size) __cluster_dims__(size, 1, 1)
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// *p as the block with this rank in the cluster has it in its shared memory.
__device__ inline double of_rank(const double* p, int rank) {
  unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(p)), there;
  double v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(v) : "r"(there) : "memory");
  return v;
}
#else  // no clusters: launched with a size of 1 only
#define CLUSTER_OF(size)
__device__ inline void cluster_sync() {}
__device__ inline double of_rank(const double* p, int) { return *p; }
#endif
#endif

/// The argument of every kernel; each uses what it needs. anybn/backends/_cuda.py has the same fields.
struct Call {
  const void *x, *residual, *dy;  // like x; residual may be null
  const unsigned char* active;    // where the relu let values through, or null
  void *y, *dresidual;            // y, or dx in backward; the gradient of the residual, or null
  const void *weight, *bias;      // (channels,) of weight_type, or null
  double *mean, *shift, *var, *m2;  // statistics: written in training, read elsewhere; shift may be null, if 0
  void *dweight, *dbias;            // like weight, or null
  const void *running_mean, *running_var;  // of running_type; null: nothing to commit
  void *new_running_mean, *new_running_var;  // may be the same
  long long* counter;                        // batches seen so far, or null
  void* partials;                            // of sums and gradient_sums: Sums, (channels, parts)
  double* corrections;                       // of finish_backward: (channels, 2); null: all 0
  long long n, channels, length;
  long long parts;  // blocks of sums and gradient_sums per channel: their gridDim.y
  long long keep;  // positions that a block keeps in shared memory
  long long ddof;
  double eps, momentum;
  int weight_type, running_type;
  int relu, propagate;
  int cumulative;  // commit: momentum is 1 / (batches with this one)
  int training;    // backward: the statistics are x's own
  int exact;       // sum squares in the wide type, value by value
};

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

/// V values that are loaded and stored at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T v[V];
};

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
__device__ inline Pair64 operator/(Pair64 a, double b) {
  double q = a.hi / b;
  return two_sum(q, (fma(-q, b, a.hi) + a.lo) / b);
}

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
struct Sums {
  W s1, s2;
  __device__ void operator+=(const Sums& other) {
    s1 = s1 + other.s1;
    s2 = s2 + other.s2;
  }
};

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
template <int K, int STRIDE, class R, class W>
__device__ inline void add_tile(Sums<W>& total, const R* values, int valid, R origin, bool exact) {
  // The middle of three, so that one value far out is not taken; the first where there are others that repeat it.
  const R center = median(values[0], values[K / 2 * STRIDE], values[(K - 1) * STRIDE]);
  Pair<R> sum = {R(0), R(0)};
  R squares = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const R v = values[k * STRIDE], d = v - center;
    add(sum, v);
    squares = fused(d, d, squares);
  }
  // s1^2 / (squares * valid) is the part of the squares that cancels.
  const R s1_here = (sum.hi - center * R(K)) + sum.lo, cancelling = valid < K ? R(0.75) : R(0.875);
  if (!exact && safe(sum.hi) && safe_square(squares) && s1_here * s1_here <= squares * (cancelling * R(valid))) {
    const W s1 = wide(sum) - wide(center) * R(K), shift = difference(center, origin);
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
template <int K, int STRIDE, class R, class W>
__device__ inline void add_gradient_tile(Sums<W>& total, const R* dy, const R* x, R mean) {
  Pair<R> s1 = {R(0), R(0)}, s2 = {R(0), R(0)};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const R g = dy[k * STRIDE];
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

// -- one value --------------------------------------------------------------------------------------------------------

/// Of a channel, in forward: ((x - mean) - shift) * scale + bias.
struct Affine {
  double mean, shift, scale, bias;
};
/// In backward: (dy + offset + ((x - mean) - shift) * slope) * scale.
struct Gradient {
  double mean, shift, scale, slope, offset;
};

/// A factor of values of T as two floats; NaN where floats cannot hold it, so that values are computed in float64
/// instead. Of small factors, the rounding error of the first float would be subnormal, which is to say 0.
template <class T>
__device__ inline Pair<float> factor(double v) {
  const double size = fabs(v), least = sizeof(T) == 4 ? 1e-24 : 1e-35;
  if (v == 0 || (size > least && size < 1 / least)) return split(v);
  return {__int_as_float(0x7FFFFFFF), 0.0f};
}

__device__ inline bool is_finite(float v) { return fabsf(v) <= 3.402823466e38f; }
__device__ inline bool is_finite(double v) { return fabs(v) <= 1.7976931348623157e308; }

/// y before the relu, for values of T.
template <class T>
struct Normalizer {
  Pair<float> mean, scale, bias;
  const Affine* exact;

  Normalizer() = default;
  __device__ explicit Normalizer(const Affine& a)
      : mean(split(a.mean)), scale(factor<T>(a.scale)), bias(split(a.bias)), exact(&a) {}

  __device__ float operator()(float x, float residual) const {
    float y;
    if (sizeof(T) == 4) {
      const Pair<float> d = two_sum(x, -mean.hi), p = two_prod(d.hi, scale.hi), b = two_sum(p.hi, bias.hi);
      const Pair<float> r = two_sum(b.hi, residual);
      const float lo = p.lo + (d.hi * scale.lo + (d.lo - mean.lo) * scale.hi);
      y = r.hi + (r.lo + (b.lo + (lo + bias.lo)));
    } else {
      y = fused((x - mean.hi) - mean.lo, scale.hi, bias.hi) + residual;
    }
    if (is_finite(y)) return y;
    return static_cast<float>((x - exact->mean) * exact->scale + exact->bias + residual);
  }
};
template <>
struct Normalizer<double> {
  Affine a;
  Normalizer() = default;
  __device__ explicit Normalizer(const Affine& a) : a(a) {}
  __device__ double operator()(double x, double residual) const {
    return ((x - a.mean) - a.shift) * a.scale + a.bias + residual;
  }
};

/// dx.
template <class T>
struct Differentiator {
  Pair<float> mean, scale, slope, offset;
  const Gradient* exact;

  Differentiator() = default;
  __device__ explicit Differentiator(const Gradient& a)
      : mean(split(a.mean)), scale(factor<T>(a.scale)), slope(factor<T>(a.slope)), offset(split(a.offset)), exact(&a) {}

  __device__ float operator()(float dy, float x) const {
    float dx;
    if (sizeof(T) == 4) {
      const Pair<float> d = two_sum(x, -mean.hi), p = two_prod(d.hi, slope.hi);
      const Pair<float> a = two_sum(dy, offset.hi), b = two_sum(a.hi, p.hi), q = two_prod(b.hi, scale.hi);
      const float lo = b.lo + (a.lo + (offset.lo + (p.lo + (d.hi * slope.lo + (d.lo - mean.lo) * slope.hi))));
      dx = q.hi + (q.lo + (b.hi * scale.lo + lo * scale.hi));
    } else {
      dx = fused((x - mean.hi) - mean.lo, slope.hi, dy + offset.hi) * scale.hi;
    }
    if (is_finite(dx)) return dx;
    return static_cast<float>((dy + exact->offset + (x - exact->mean) * exact->slope) * exact->scale);
  }
};
template <>
struct Differentiator<double> {
  Gradient a;
  Differentiator() = default;
  __device__ explicit Differentiator(const Gradient& a) : a(a) {}
  __device__ double operator()(double dy, double x) const {
    const Pair64 p = two_prod((x - a.mean) - a.shift, a.slope), s = two_sum(dy, a.offset), t = two_sum(s.hi, p.hi);
    return (t.hi + (t.lo + (s.lo + p.lo))) * a.scale;
  }
};

// -- one channel ------------------------------------------------------------------------------------------------------

__device__ inline double rstd_of(const Call& c, double var) { return 1.0 / sqrt(var + c.eps); }

__device__ inline Affine affine_of(const Call& c, long long channel, double mean, double shift, double var) {
  const double weight = parameter(c.weight, c.weight_type, channel, 1.0);
  return {mean, shift, rstd_of(c, var) * weight, parameter(c.bias, c.weight_type, channel, 0.0)};
}

/// Folds the statistics of a batch into the running ones, unless they are not finite.
__device__ inline void commit_channel(const Call& c, long long channel, double mean, double m2, double momentum) {
  const double var = m2 / static_cast<double>(c.n * c.length - c.ddof);
  double new_mean = parameter(c.running_mean, c.running_type, channel, 0.0);
  double new_var = parameter(c.running_var, c.running_type, channel, 0.0);
  if (c.propagate || (is_finite(mean) && is_finite(var))) {
    new_mean = (1.0 - momentum) * new_mean + momentum * mean;
    new_var = (1.0 - momentum) * new_var + momentum * var;
  }
  set_parameter(c.new_running_mean, c.running_type, channel, new_mean);
  set_parameter(c.new_running_var, c.running_type, channel, new_var);
}

/// What the values of a channel are measured from in the sums of forward: its first one.
template <class T>
__device__ inline typename Real<T>::type origin_of(const Call& c, long long channel) {
  return value(static_cast<const T*>(c.x)[channel * c.length]);
}

/// Statistics from the sums of a whole channel; what is kept of them is written if this thread is the one to do so.
template <class R, class W>
__device__ inline Affine finish_channel(
    const Call& c, long long channel, R origin, const Sums<W>& sums, bool writes) {
  const double count = static_cast<double>(c.n * c.length);
  const W offset = sums.s1 / count;
  const Pair64 mean = as_pair(wide(origin) + offset);
  const double m2 = as_pair(sums.s2 - sums.s1 * offset).hi, var = m2 / count;
  if (writes) {
    c.mean[channel] = mean.hi;
    if (c.shift) c.shift[channel] = mean.lo;
    c.var[channel] = var;
    c.m2[channel] = m2;
    if (c.running_mean) commit_channel(c, channel, mean.hi + mean.lo, m2, c.momentum);
    if (c.counter && channel == 0) *c.counter += 1;
  }
  return affine_of(c, channel, mean.hi, mean.lo, var);
}

__device__ inline Affine known_affine(const Call& c, long long channel) {
  return affine_of(c, channel, c.mean[channel], c.shift ? c.shift[channel] : 0.0, c.var[channel]);
}

/// The mean that values of T are measured from in the sums of backward; what it leaves out comes in afterwards.
template <class T>
__device__ inline typename Real<T>::type coarse_mean(const Call& c, long long channel) {
  return static_cast<typename Real<T>::type>(c.mean[channel]);
}

struct Corrections {
  double k1, k2;  // dbias / count and dweight / count
};

/// dweight and dbias from the sums of a whole channel, and what dx needs of them.
template <class T, class W>
__device__ inline Corrections finish_gradient(const Call& c, long long channel, const Sums<W>& sums, bool writes) {
  const double rest = (c.mean[channel] - coarse_mean<T>(c, channel)) + (c.shift ? c.shift[channel] : 0.0);
  const Pair64 s1 = as_pair(sums.s1), s2 = as_pair(sums.s2) - s1 * rest;
  const double rstd = rstd_of(c, c.var[channel]), dbias = s1.hi, dweight = (s2 * rstd).hi;
  if (writes) {
    set_parameter(c.dweight, c.weight_type, channel, dweight);
    set_parameter(c.dbias, c.weight_type, channel, dbias);
  }
  if (!c.training) return {0.0, 0.0};
  const double count = static_cast<double>(c.n * c.length);
  return {dbias / count, dweight / count};
}

__device__ inline Gradient gradient_of(const Call& c, long long channel, Corrections k) {
  const Affine a = known_affine(c, channel);
  return {a.mean, a.shift, a.scale, -rstd_of(c, c.var[channel]) * k.k2, -k.k1};
}

// -- one block --------------------------------------------------------------------------------------------------------

/// The part of a block's positions: first to last of the vectors of its channels. Of each, ARRAYS are read: x, and in
/// backward dy.
template <class T, int V, bool ROWS, int ARRAYS>
struct Part {
  using R = typename Real<T>::type;
  static constexpr int LANES = ROWS ? V : 1;  // channels of a thread
  static constexpr int UNROLL = (V >= 8 ? 2 : V >= 4 ? 4 : 8) / ARRAYS;  // vectors of a tile
  static constexpr int K = ROWS ? UNROLL : UNROLL * V;  // values of a tile per channel
  static constexpr int STRIDE = ROWS ? V : 1;           // and the distance between them

  const Call& c;
  long long per_plane, first, last, first_channel, channel;
  int columns;  // channels of the block

  __device__ Part(const Call& c, long long tile, long long part, long long parts) : c(c) {
    per_plane = ROWS ? 1 : c.length / V;
    const long long positions = c.n * per_plane, share = (positions + parts - 1) / parts;
    first = min(part * share, positions);
    last = min(first + share, positions);
    columns = blockDim.x * LANES;
    first_channel = tile * columns;
    channel = first_channel + threadIdx.x * LANES;
  }

  /// False for a thread beyond the last channel, which has nothing to do but to wait with the others.
  __device__ bool has_channel() const { return channel < c.channels; }
};

/// Steps of a thread through its part, with the offset of each position in the array.
template <class P>
struct Walk {
  long long position, last, offset, in_plane;
  long long per_plane, step_in_plane, advance, wrap;

  __device__ Walk(const P& part, int width) : position(part.first + threadIdx.y), last(part.last) {
    const long long length = part.c.length, step = blockDim.y;
    per_plane = part.per_plane;
    in_plane = position % per_plane;
    step_in_plane = step % per_plane;
    offset = (position / per_plane * part.c.channels + part.channel) * length + in_plane * width;
    advance = step / per_plane * part.c.channels * length + step_in_plane * width;
    wrap = (part.c.channels - 1) * length;
    if (!part.has_channel()) last = position;
  }
  __device__ bool inside() const { return position < last; }
  __device__ void next() {
    position += blockDim.y;
    in_plane += step_in_plane;
    offset += advance;
    if (in_plane >= per_plane) {
      in_plane -= per_plane;
      offset += wrap;
    }
  }
};

/// Vectors of one block in shared memory, by position.
template <class T, int V>
struct Kept {
  Vector<T, V>* memory;
  long long first, count;

  __device__ bool has(long long position) const { return position - first < count; }
  __device__ Vector<T, V>& at(long long position) const {
    return memory[static_cast<int>(position - first) * blockDim.x + threadIdx.x];
  }
};

template <class T, int V>
__device__ inline Vector<T, V> load(const void* array, long long offset) {
  return *reinterpret_cast<const Vector<T, V>*>(static_cast<const T*>(array) + offset);
}
template <class T, int V>
__device__ inline void store(void* array, long long offset, const Vector<T, V>& v) {
  *reinterpret_cast<Vector<T, V>*>(static_cast<T*>(array) + offset) = v;
}

/// dy of a position, behind the relu.
template <class T, int V>
__device__ inline Vector<T, V> load_gradient(const Call& c, long long offset) {
  Vector<T, V> dy = load<T, V>(c.dy, offset);
  if (c.active) {
    const Vector<unsigned char, V> active = load<unsigned char, V>(c.active, offset);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (!active.v[j]) dy.v[j] = T{};
    }
  }
  return dy;
}

/// Sums of a thread over its positions in a part. What fits is kept.
template <class T, int V, bool ROWS, class W>
__device__ inline void sum_part(const Part<T, V, ROWS, 1>& part, const Kept<T, V>& kept, Sums<W>* total) {
  using P = Part<T, V, ROWS, 1>;
  using R = typename P::R;
  R origin[P::LANES];
#pragma unroll
  for (int j = 0; j < P::LANES; ++j) {
    total[j] = {};
    if (part.has_channel()) origin[j] = origin_of<T>(part.c, part.channel + j);
  }
  for (Walk<P> walk(part, V); walk.inside();) {
    Vector<T, V> loaded[P::UNROLL];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) {
      if (walk.inside()) {
        loaded[u] = load<T, V>(part.c.x, walk.offset);
        if (kept.has(walk.position)) kept.at(walk.position) = loaded[u];
        ++valid;
      } else {
        loaded[u] = loaded[0];
        if (!ROWS) {
#pragma unroll
          for (int j = 1; j < V; ++j) loaded[u].v[j] = loaded[u].v[0];
        }
      }
      walk.next();
    }
    R values[P::UNROLL * V];
#pragma unroll
    for (int i = 0; i < P::UNROLL * V; ++i) values[i] = value(loaded[i / V].v[i % V]);
#pragma unroll
    for (int j = 0; j < P::LANES; ++j) {
      add_tile<P::K, P::STRIDE>(total[j], values + j, ROWS ? valid : valid * V, origin[j], part.c.exact);
    }
  }
}

/// The same of the sums of backward.
template <class T, int V, bool ROWS, class W>
__device__ inline void sum_gradient_part(
    const Part<T, V, ROWS, 2>& part, const Kept<T, V>& kept_x, const Kept<T, V>& kept_dy, Sums<W>* total) {
  using P = Part<T, V, ROWS, 2>;
  using R = typename P::R;
  R mean[P::LANES];
#pragma unroll
  for (int j = 0; j < P::LANES; ++j) {
    total[j] = {};
    if (part.has_channel()) mean[j] = coarse_mean<T>(part.c, part.channel + j);
  }
  for (Walk<P> walk(part, V); walk.inside();) {
    Vector<T, V> x[P::UNROLL], dy[P::UNROLL];
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) {
      if (walk.inside()) {
        x[u] = load<T, V>(part.c.x, walk.offset);
        dy[u] = load_gradient<T, V>(part.c, walk.offset);
        if (kept_x.has(walk.position)) {
          kept_x.at(walk.position) = x[u];
          kept_dy.at(walk.position) = dy[u];
        }
      } else {
        x[u] = x[0];
        dy[u] = {};
      }
      walk.next();
    }
    R x_values[P::UNROLL * V], dy_values[P::UNROLL * V];
#pragma unroll
    for (int i = 0; i < P::UNROLL * V; ++i) {
      x_values[i] = value(x[i / V].v[i % V]);
      dy_values[i] = value(dy[i / V].v[i % V]);
    }
#pragma unroll
    for (int j = 0; j < P::LANES; ++j) {
      add_gradient_tile<P::K, P::STRIDE>(total[j], dy_values + j, x_values + j, mean[j]);
    }
  }
}

/// Adds up what the threads of a block have per channel: the lanes of a warp, then the warps in order. `scratch` has
/// room for the columns of every warp; the totals are left in its first ones, each seen by the thread that added it:
/// thread t, t + threads, ...
template <int LANES, class W>
__device__ inline void sum_block(Sums<W>* mine, Sums<W>* scratch) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int columns = blockDim.x * LANES, lane = thread % 32, warp = thread / 32;
  for (int offset = 16; offset >= static_cast<int>(blockDim.x); offset /= 2) {
#pragma unroll
    for (int j = 0; j < LANES; ++j) mine[j] += {shuffled(mine[j].s1, offset), shuffled(mine[j].s2, offset)};
  }
  if (lane < static_cast<int>(blockDim.x)) {
#pragma unroll
    for (int j = 0; j < LANES; ++j) scratch[warp * columns + lane * LANES + j] = mine[j];
  }
  __syncthreads();
  for (int t = thread; t < columns; t += threads) {
    for (int w = 1; w < threads / 32; ++w) scratch[t] += scratch[w * columns + t];
  }
}

/// The total of a column over the blocks of the cluster, in the order of their ranks.
template <class W>
__device__ inline Sums<W> sum_cluster(const Sums<W>* scratch, int column, int cluster) {
  if (cluster == 1) return scratch[column];
  Sums<W> total = {};
  for (int rank = 0; rank < cluster; ++rank) {
    add_rank(total.s1, &scratch[column].s1, rank);
    add_rank(total.s2, &scratch[column].s2, rank);
  }
  return total;
}

/// A block's shared memory: scratch of `sum_block`, then something per channel of the block, then what is kept.
template <class W, class PerChannel>
struct Shared {
  Sums<W>* scratch;
  PerChannel* channels;
  unsigned char* rest;

  __device__ explicit Shared(int columns) {
    const int warps = blockDim.x * blockDim.y / 32;
    scratch = reinterpret_cast<Sums<W>*>(shared_memory());
    channels = reinterpret_cast<PerChannel*>(scratch + warps * columns);
    rest = reinterpret_cast<unsigned char*>(channels + columns);
    rest += -reinterpret_cast<unsigned long long>(rest) & 15;
  }
};

/// y of a part, from what is kept of x and, beyond that, from x itself.
template <class T, int V, bool ROWS>
__device__ inline void normalize_part(const Part<T, V, ROWS, 1>& part, const Kept<T, V>& kept, const Affine* channels) {
  using P = Part<T, V, ROWS, 1>;
  const Call& c = part.c;
  Normalizer<T> normalize[P::LANES];
#pragma unroll
  for (int j = 0; j < P::LANES; ++j) normalize[j] = Normalizer<T>(channels[threadIdx.x * P::LANES + j]);
  for (Walk<P> walk(part, V); walk.inside();) {
    Vector<T, V> x[P::UNROLL], residual[P::UNROLL];
    long long offset[P::UNROLL];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) {
      residual[u] = {};
      if (walk.inside()) {
        offset[u] = walk.offset;
        x[u] = kept.has(walk.position) ? kept.at(walk.position) : load<T, V>(c.x, walk.offset);
        if (c.residual) residual[u] = load<T, V>(c.residual, walk.offset);
        ++valid;
      }
      walk.next();
    }
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) {
      if (u < valid) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          auto y = normalize[ROWS ? j : 0](value(x[u].v[j]), value(residual[u].v[j]));
          if (c.relu && y <= 0) y = 0;  // keeps NaN
          round_to(x[u].v[j], y);
        }
        store<T, V>(c.y, offset[u], x[u]);
      }
    }
  }
}

/// dx of a part, and the gradient of the residual.
template <class T, int V, bool ROWS>
__device__ inline void differentiate_part(
    const Part<T, V, ROWS, 2>& part, const Kept<T, V>& kept_x, const Kept<T, V>& kept_dy, const Gradient* channels) {
  using P = Part<T, V, ROWS, 2>;
  const Call& c = part.c;
  Differentiator<T> differentiate[P::LANES];
#pragma unroll
  for (int j = 0; j < P::LANES; ++j) differentiate[j] = Differentiator<T>(channels[threadIdx.x * P::LANES + j]);
  for (Walk<P> walk(part, V); walk.inside();) {
    Vector<T, V> x[P::UNROLL], dy[P::UNROLL];
    long long offset[P::UNROLL];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) {
      if (walk.inside()) {
        offset[u] = walk.offset;
        if (kept_x.has(walk.position)) {
          x[u] = kept_x.at(walk.position);
          dy[u] = kept_dy.at(walk.position);
        } else {
          x[u] = load<T, V>(c.x, walk.offset);
          dy[u] = load_gradient<T, V>(c, walk.offset);
        }
        ++valid;
      }
      walk.next();
    }
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) {
      if (u < valid) {
        if (c.dresidual) store<T, V>(c.dresidual, offset[u], dy[u]);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          round_to(x[u].v[j], differentiate[ROWS ? j : 0](value(dy[u].v[j]), value(x[u].v[j])));
        }
        store<T, V>(c.y, offset[u], x[u]);
      }
    }
  }
}

// -- kernels ----------------------------------------------------------------------------------------------------------

// With the number of blocks per multiprocessor, without which the compiler spills in order to have more of them.
constexpr int MOST_THREADS = 512;       // of a block that keeps something
constexpr int STREAMING_THREADS = 256;  // of one that does not: as in _cuda_plan.py

/// One launch from x to y: a cluster of blocks, one after the other in the grid, for each tile of channels.
template <class T, int V, bool ROWS>
__device__ void train_cluster(const Call& c, int cluster) {
  using P = Part<T, V, ROWS, 1>;
  using W = typename Wide<typename P::R>::type;
  const long long tile = blockIdx.x / cluster;
  const int rank = blockIdx.x % cluster, threads = blockDim.x * blockDim.y;
  const P part(c, tile, rank, cluster);
  const Shared<W, Affine> shared(part.columns);
  const Kept<T, V> kept = {reinterpret_cast<Vector<T, V>*>(shared.rest), part.first, c.keep};

  Sums<W> mine[P::LANES];
  sum_part(part, kept, mine);
  sum_block<P::LANES>(mine, shared.scratch);
  // Before the barrier: behind it, where y is x, another block may write over the origin.
  for (int t = threadIdx.y * blockDim.x + threadIdx.x; t < part.columns; t += threads) {
    if (part.first_channel + t < c.channels) shared.channels[t].mean = origin_of<T>(c, part.first_channel + t);
  }
  if (cluster > 1) cluster_sync();
  for (int t = threadIdx.y * blockDim.x + threadIdx.x; t < part.columns; t += threads) {
    const long long channel = part.first_channel + t;
    if (channel >= c.channels) break;
    const Sums<W> sums = sum_cluster(shared.scratch, t, cluster);
    const auto origin = static_cast<typename P::R>(shared.channels[t].mean);
    shared.channels[t] = finish_channel(c, channel, origin, sums, rank == 0);
  }
  __syncthreads();
  if (part.has_channel()) normalize_part(part, kept, shared.channels);
  if (cluster > 1) cluster_sync();  // the others may still be reading this block's sums
}
template <class T, int V, bool ROWS, int CLUSTER>
__global__ void CLUSTER_OF(CLUSTER) __launch_bounds__(MOST_THREADS, 1) train(const Call c) {
  train_cluster<T, V, ROWS>(c, CLUSTER);
}

/// One launch from dy and x to dx, in the same way.
template <class T, int V, bool ROWS>
__device__ void backward_cluster(const Call& c, int cluster) {
  using P = Part<T, V, ROWS, 2>;
  using W = typename Wide<typename P::R>::type;
  const long long tile = blockIdx.x / cluster;
  const int rank = blockIdx.x % cluster, threads = blockDim.x * blockDim.y;
  const P part(c, tile, rank, cluster);
  const Shared<W, Gradient> shared(part.columns);
  Vector<T, V>* const memory = reinterpret_cast<Vector<T, V>*>(shared.rest);
  const Kept<T, V> kept_x = {memory, part.first, c.keep}, kept_dy = {memory + c.keep * blockDim.x, part.first, c.keep};

  Sums<W> mine[P::LANES];
  sum_gradient_part(part, kept_x, kept_dy, mine);
  sum_block<P::LANES>(mine, shared.scratch);
  if (cluster > 1) cluster_sync();
  for (int t = threadIdx.y * blockDim.x + threadIdx.x; t < part.columns; t += threads) {
    const long long channel = part.first_channel + t;
    if (channel >= c.channels) break;
    const Sums<W> sums = sum_cluster(shared.scratch, t, cluster);
    shared.channels[t] = gradient_of(c, channel, finish_gradient<T>(c, channel, sums, rank == 0));
  }
  __syncthreads();
  if (part.has_channel()) differentiate_part(part, kept_x, kept_dy, shared.channels);
  if (cluster > 1) cluster_sync();
}
template <class T, int V, bool ROWS, int CLUSTER>
__global__ void CLUSTER_OF(CLUSTER) __launch_bounds__(MOST_THREADS, 1) backward(const Call c) {
  backward_cluster<T, V, ROWS>(c, CLUSTER);
}

/// The sums of a block, written to (channels, parts).
template <class P, class W>
__device__ inline void write_partials(const P& part, Sums<W>* mine) {
  const Call& c = part.c;
  const Shared<W, Affine> shared(part.columns);
  const int threads = blockDim.x * blockDim.y;
  sum_block<P::LANES>(mine, shared.scratch);
  for (int t = threadIdx.y * blockDim.x + threadIdx.x; t < part.columns; t += threads) {
    const long long channel = part.first_channel + t;
    if (channel >= c.channels) break;
    static_cast<Sums<W>*>(c.partials)[channel * c.parts + blockIdx.y] = shared.scratch[t];
  }
}

template <class T, int V, bool ROWS>
__global__ void __launch_bounds__(STREAMING_THREADS, 2) sums(const Call c) {
  using P = Part<T, V, ROWS, 1>;
  const P part(c, blockIdx.x, blockIdx.y, gridDim.y);
  Sums<typename Wide<typename P::R>::type> mine[P::LANES];
  sum_part(part, Kept<T, V>{}, mine);
  write_partials(part, mine);
}

template <class T, int V, bool ROWS>
__global__ void __launch_bounds__(STREAMING_THREADS, 2) gradient_sums(const Call c) {
  using P = Part<T, V, ROWS, 2>;
  const P part(c, blockIdx.x, blockIdx.y, gridDim.y);
  Sums<typename Wide<typename P::R>::type> mine[P::LANES];
  sum_gradient_part(part, Kept<T, V>{}, Kept<T, V>{}, mine);
  write_partials(part, mine);
}

/// The sums of a channel over all parts, in a fixed order, by one warp; every lane gets them.
template <class W>
__device__ inline Sums<W> sum_partials(const Call& c, long long channel) {
  const Sums<W>* const partials = static_cast<const Sums<W>*>(c.partials) + channel * c.parts;
  Sums<W> total = {};
  for (long long i = threadIdx.x; i < c.parts; i += 32) total += partials[i];
  for (int offset = 16; offset > 0; offset /= 2) total += {shuffled(total.s1, offset), shuffled(total.s2, offset)};
  return total;
}

/// A warp per channel: blocks of (32, warps).
template <class T>
__global__ void __launch_bounds__(STREAMING_THREADS, 2) finish_train(const Call c) {
  using W = typename Wide<typename Real<T>::type>::type;
  const long long channel = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (channel >= c.channels) return;
  const Sums<W> sums = sum_partials<W>(c, channel);
  if (threadIdx.x == 0) finish_channel(c, channel, origin_of<T>(c, channel), sums, true);
}

template <class T>
__global__ void __launch_bounds__(STREAMING_THREADS, 2) finish_backward(const Call c) {
  using W = typename Wide<typename Real<T>::type>::type;
  const long long channel = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (channel >= c.channels) return;
  const Sums<W> sums = sum_partials<W>(c, channel);
  if (threadIdx.x > 0) return;
  const Corrections k = finish_gradient<T>(c, channel, sums, true);
  c.corrections[2 * channel] = k.k1;
  c.corrections[2 * channel + 1] = k.k2;
}

/// y from statistics that are known.
template <class T, int V, bool ROWS>
__global__ void __launch_bounds__(STREAMING_THREADS, 2) evaluate(const Call c) {
  using P = Part<T, V, ROWS, 1>;
  const P part(c, blockIdx.x, blockIdx.y, gridDim.y);
  Affine* const channels = reinterpret_cast<Affine*>(shared_memory());
  const int threads = blockDim.x * blockDim.y;
  for (int t = threadIdx.y * blockDim.x + threadIdx.x; t < part.columns; t += threads) {
    if (part.first_channel + t < c.channels) channels[t] = known_affine(c, part.first_channel + t);
  }
  __syncthreads();
  if (part.has_channel()) normalize_part(part, Kept<T, V>{}, channels);
}

/// dx from corrections that are known.
template <class T, int V, bool ROWS>
__global__ void __launch_bounds__(STREAMING_THREADS, 2) gradients(const Call c) {
  using P = Part<T, V, ROWS, 2>;
  const P part(c, blockIdx.x, blockIdx.y, gridDim.y);
  Gradient* const channels = reinterpret_cast<Gradient*>(shared_memory());
  const int threads = blockDim.x * blockDim.y;
  for (int t = threadIdx.y * blockDim.x + threadIdx.x; t < part.columns; t += threads) {
    const long long channel = part.first_channel + t;
    if (channel >= c.channels) break;
    Corrections k = {0.0, 0.0};
    if (c.corrections) k = {c.corrections[2 * channel], c.corrections[2 * channel + 1]};
    channels[t] = gradient_of(c, channel, k);
  }
  __syncthreads();
  if (part.has_channel()) differentiate_part(part, Kept<T, V>{}, Kept<T, V>{}, channels);
}

/// The running statistics and the counter alone. One block, since every channel may need the counter as it was.
__global__ void __launch_bounds__(MOST_THREADS, 1) commit(const Call c) {
  const double momentum = c.cumulative ? 1.0 / static_cast<double>(*c.counter + 1) : c.momentum;
  for (long long channel = threadIdx.x; channel < c.channels; channel += blockDim.x) {
    const double mean = c.mean[channel] + (c.shift ? c.shift[channel] : 0.0);
    commit_channel(c, channel, mean, c.m2[channel], momentum);
  }
  __syncthreads();
  if (c.counter && threadIdx.x == 0) *c.counter += 1;
}
