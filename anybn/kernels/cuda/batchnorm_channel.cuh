// A call, and what is done to one value and one channel.

/// The argument of every kernel; each uses what it needs. anybn/kernels/cuda/launch.py has the same fields.
struct Call {
  const void *x, *residual, *dy;  // like x; residual may be null
  const unsigned char* active;    // where the relu let values through, a byte each, or null
  const void* activated;          // or y, like x, which is above 0 there
  const unsigned char* shown;     // the positions that count, (n, length), a byte each, of MASKED kernels
  void *y, *dresidual;            // y, or dx in backward; the gradient of the residual, or null
  const void *weight, *bias;      // (channels,) of weight_type, or null
  double *mean, *shift, *var, *m2;  // statistics: written in training, read elsewhere; shift may be null, if 0
  void *dweight, *dbias;            // like weight, or null
  const void *running_mean, *running_var;  // of running_type; null: nothing to commit
  void *new_running_mean, *new_running_var;  // may be the same
  long long* counter;                        // batches seen so far, or null
  const long long *shown_count, *first_shown;  // how many positions are shown, and which is the first; where that counts
  void* partials;                            // Sums of a block, (channels, parts)
  double* corrections;                       // of finish_backward: (channels, 2); null: all 0
  unsigned long long* barriers;              // of groups of blocks: (groups,)
  long long n, channels, length;
  long long parts;  // blocks per channel of kernels that write partials: their gridDim.y
  long long keep;   // positions that a block keeps in shared memory
  long long width;  // threads of a block along channels that have something to do, of blockDim.x
  long long ddof;
  double inverse;  // of the number of values in a channel
  double eps, momentum;
  int weight_type, running_type;
  int relu, propagate;
  int cumulative;  // commit: momentum is 1 / (batches with this one)
  int training;    // backward: the statistics are x's own
  int exact;       // sum squares in the wide type, value by value
};

// -- one value --------------------------------------------------------------------------------------------------------

/// Of a channel, in forward: ((x - mean) - shift) * scale + bias.
struct Affine {
  double mean, shift, scale, bias;
};
/// In backward: (dy + offset + ((x - mean) - shift) * slope) * scale.
struct Gradient {
  double mean, shift, scale, slope, offset;
};

/// Whether a float has room for a factor: for as small a one as `least`, and for the reciprocal of that.
__device__ inline bool fits(double factor, double least) {
  const double size = fabs(factor);
  return factor == 0 || (size > least && size < 1 / least);
}
/// And for a mean: the distance of any float from it is one as well.
__device__ inline bool fits(double mean) { return fabs(mean) < 1e30; }

/// A factor as two floats; NaN where they cannot hold it, so that values are computed in float64 instead. Of small
/// factors, the rounding error of the first float would be subnormal, which is to say 0.
__device__ inline Pair<float> factor(double v) {
  if (fits(v, 1e-24)) return split(v);
  return {__int_as_float(0x7FFFFFFF), 0.0f};
}

__device__ inline bool is_finite(float v) { return fabsf(v) <= 3.402823466e38f; }
__device__ inline bool is_finite(double v) { return fabs(v) <= 1.7976931348623157e308; }

/// The factor as a float; NaN if the channel is not for floats.
__device__ inline float if_fits(double factor, bool fits) {
  return fits ? static_cast<float>(factor) : __int_as_float(0x7FFFFFFF);
}

/// y before the relu, for 16 bits: in float32 if that `suits` the channel. Else, and where CHECKED and the result is not
/// finite, `exactly` says what y is: float32 may have overflowed.
template <class T>
struct Normalizer {
  static constexpr bool CHECKED = false;
  float mean, scale, bias;

  Normalizer() = default;
  __device__ explicit Normalizer(const Affine& a)
      : mean(static_cast<float>(a.mean)),
        scale(if_fits(a.scale, fits(a.mean) && fits(a.scale, 1e-35))),
        bias(static_cast<float>(a.bias - (a.mean - mean) * a.scale)) {}  // with what rounding takes from the mean

  __device__ bool suits() const { return scale == scale; }
  __device__ float operator()(float x) const { return fused(x - mean, scale, bias); }
  __device__ float operator()(float x, float residual) const { return (*this)(x) + residual; }
};
template <>
struct Normalizer<float> {
#if FAST_DOUBLE
  static constexpr bool CHECKED = false;
  double mean, scale, bias;

  Normalizer() = default;
  __device__ explicit Normalizer(const Affine& a) : mean(a.mean), scale(a.scale), bias(a.bias) {}

  __device__ float operator()(float x) const { return narrowed(fma(widened(x) - mean, scale, bias)); }
  __device__ float operator()(float x, float residual) const {
    return narrowed(fma(widened(x) - mean, scale, bias) + widened(residual));
  }
#else
  static constexpr bool CHECKED = true;
  Pair<float> mean, scale, bias;

  Normalizer() = default;
  __device__ explicit Normalizer(const Affine& a)
      : mean(split(a.mean)), scale(factor(a.scale)), bias(split(a.bias)) {}

  __device__ float operator()(float x) const { return (*this)(x, 0); }
  __device__ float operator()(float x, float residual) const {
    const Pair<float> d = two_sum(x, -mean.hi), p = two_prod(d.hi, scale.hi), b = two_sum(p.hi, bias.hi);
    const Pair<float> r = two_sum(b.hi, residual);
    const float lo = p.lo + (d.hi * scale.lo + (d.lo - mean.lo) * scale.hi);
    return r.hi + (r.lo + (b.lo + (lo + bias.lo)));
  }
#endif
};
template <>
struct Normalizer<double> {
  static constexpr bool CHECKED = false;
  Affine a;

  Normalizer() = default;
  __device__ explicit Normalizer(const Affine& a) : a(a) {}

  __device__ double operator()(double x) const { return ((x - a.mean) - a.shift) * a.scale + a.bias; }
  __device__ double operator()(double x, double residual) const { return (*this)(x) + residual; }
};
__device__ inline double exactly(const Affine& a, double x, double residual) {
  return (x - a.mean) * a.scale + a.bias + residual;
}

/// dx, likewise.
template <class T>
struct Differentiator {
  static constexpr bool CHECKED = false;
  float mean, scale, slope, offset;

  Differentiator() = default;
  __device__ explicit Differentiator(const Gradient& a)
      : mean(static_cast<float>(a.mean)),
        scale(if_fits(a.scale, fits(a.mean) && fits(a.scale, 1e-35) && fits(a.slope, 1e-35))),
        slope(static_cast<float>(a.slope)),
        offset(static_cast<float>(a.offset - (a.mean - mean) * a.slope)) {}

  __device__ bool suits() const { return scale == scale; }
  __device__ float operator()(float x, float dy) const { return fused(x - mean, slope, dy + offset) * scale; }
};
template <>
struct Differentiator<float> {
#if FAST_DOUBLE
  static constexpr bool CHECKED = false;
  double mean, scale, slope, offset;

  Differentiator() = default;
  __device__ explicit Differentiator(const Gradient& a)
      : mean(a.mean), scale(a.scale), slope(a.slope), offset(a.offset) {}

  __device__ float operator()(float x, float dy) const {
    return narrowed(fma(widened(x) - mean, slope, widened(dy) + offset) * scale);
  }
#else
  static constexpr bool CHECKED = true;
  Pair<float> mean, scale, slope, offset;

  Differentiator() = default;
  __device__ explicit Differentiator(const Gradient& a)
      : mean(split(a.mean)), scale(factor(a.scale)), slope(factor(a.slope)), offset(split(a.offset)) {}

  __device__ float operator()(float x, float dy) const {
    const Pair<float> d = two_sum(x, -mean.hi), p = two_prod(d.hi, slope.hi);
    const Pair<float> a = two_sum(dy, offset.hi), b = two_sum(a.hi, p.hi), q = two_prod(b.hi, scale.hi);
    const float lo = b.lo + (a.lo + (offset.lo + (p.lo + (d.hi * slope.lo + (d.lo - mean.lo) * slope.hi))));
    return q.hi + (q.lo + (b.hi * scale.lo + lo * scale.hi));
  }
#endif
};
template <>
struct Differentiator<double> {
  static constexpr bool CHECKED = false;
  Gradient a;

  Differentiator() = default;
  __device__ explicit Differentiator(const Gradient& a) : a(a) {}

  __device__ double operator()(double x, double dy) const {
    const Pair64 p = two_prod((x - a.mean) - a.shift, a.slope), s = two_sum(dy, a.offset), t = two_sum(s.hi, p.hi);
    return (t.hi + (t.lo + (s.lo + p.lo))) * a.scale;
  }
};
__device__ inline double exactly(const Gradient& a, double x, double dy) {
  return (dy + a.offset + (x - a.mean) * a.slope) * a.scale;
}

// -- one channel ------------------------------------------------------------------------------------------------------

__device__ inline double count_of(const Call& c) { return static_cast<double>(c.n * c.length); }
/// v / count, by the reciprocal that is known and one correction (Markstein 1990), in an eighth of the time.
__device__ inline double per_value(const Call& c, double v) {
  const double q = v * c.inverse;
  return is_finite(q) ? fma(fma(-q, count_of(c), v), c.inverse, q) : q;
}
__device__ inline Pair64 per_value(const Call& c, Pair64 v) {
  const double q = per_value(c, v.hi);
  return two_sum(q, (fma(-q, count_of(c), v.hi) + v.lo) * c.inverse);
}
__device__ inline double rstd_of(const Call& c, double var) { return 1.0 / sqrt(var + c.eps); }

/// Folds the statistics of a batch into the running ones, unless they are not finite.
__device__ inline void commit_channel(const Call& c, long long channel, double momentum) {
  const double mean = c.mean[channel] + (c.shift ? c.shift[channel] : 0.0);
  const double var = c.m2[channel] / static_cast<double>(c.n * c.length - c.ddof);
  double new_mean = parameter(c.running_mean, c.running_type, channel, 0.0);
  double new_var = parameter(c.running_var, c.running_type, channel, 0.0);
  if (c.propagate || (is_finite(mean) && is_finite(var))) {
    new_mean = (1.0 - momentum) * new_mean + momentum * mean;
    new_var = (1.0 - momentum) * new_var + momentum * var;
  }
  set_parameter(c.new_running_mean, c.running_type, channel, new_mean);
  set_parameter(c.new_running_var, c.running_type, channel, new_var);
}

/// The same as the last thing that training does for a channel: nobody waits for it.
__device__ inline void commit_last(const Call& c, long long channel) {
  if (c.running_mean) commit_channel(c, channel, c.momentum);
  if (c.counter && channel == 0) *c.counter += 1;
}

/// What the values of a channel are measured from in the sums of forward: the first one that counts. In float64, the
/// squares of 16 bits need no origin: they are exact, and so are their sums, where there is much to cancel.
template <class T, bool MASKED>
__device__ inline typename Real<T>::type origin_of(const Call& c, long long channel) {
  if (FAST_DOUBLE && sizeof(T) == 2) return 0;
  if (MASKED && *c.shown_count == 0) return 0;
  const long long first = MASKED ? *c.first_shown : 0;
  return value(static_cast<const T*>(c.x)[(first / c.length * c.channels + channel) * c.length + first % c.length]);
}

/// The call as if a channel had no other values than those that count, but at least one. With constant statistics, it
/// does not matter how many there are.
template <bool MASKED>
__device__ inline Call counted(Call c) {
  if (MASKED && c.shown_count) {
    c.n = *c.shown_count > 0 ? *c.shown_count : 1;
    c.length = 1;
    c.inverse = 1.0 / static_cast<double>(c.n);
  }
  return c;
}

/// Brings nearer what will be read of the parameters, and in backward of the statistics.
__device__ inline void prefetch_channel(const Call& c, long long channel, bool statistics) {
  const int size = c.weight_type == FLOAT64 ? 8 : c.weight_type == FLOAT32 ? 4 : 2;
  if (c.weight) prefetch(static_cast<const char*>(c.weight) + channel * size);
  if (c.bias) prefetch(static_cast<const char*>(c.bias) + channel * size);
  if (statistics) prefetch(c.mean + channel);
  if (statistics) prefetch(c.var + channel);
}

/// Of a channel before its statistics are known: mean is the origin, scale the weight.
template <class T, bool MASKED>
__device__ inline Affine before_channel(const Call& c, long long channel) {
  const double weight = parameter(c.weight, c.weight_type, channel, 1.0);
  return {origin_of<T, MASKED>(c, channel), 0.0, weight, parameter(c.bias, c.weight_type, channel, 0.0)};
}

/// Statistics from the sums of a whole channel; what is kept of them is written if this thread is the one to do so.
template <class W>
__device__ inline Affine finish_channel(
    const Call& c, long long channel, const Affine& before, const Sums<W>& sums, bool writes) {
  const Pair64 s1 = as_pair(sums.s1), offset = per_value(c, s1), mean = as_pair(before.mean) + offset;
  const double m2 = (as_pair(sums.s2) - s1 * offset).hi, var = per_value(c, m2);
  if (writes) {
    c.mean[channel] = mean.hi;
    if (c.shift) c.shift[channel] = mean.lo;
    c.var[channel] = var;
    c.m2[channel] = m2;
  }
  return {mean.hi, mean.lo, rstd_of(c, var) * before.scale, before.bias};
}

__device__ inline Affine known_affine(const Call& c, long long channel) {
  const double weight = parameter(c.weight, c.weight_type, channel, 1.0);
  const double shift = c.shift ? c.shift[channel] : 0.0;
  return {c.mean[channel], shift, rstd_of(c, c.var[channel]) * weight, parameter(c.bias, c.weight_type, channel, 0.0)};
}

/// The mean that values of T are measured from in the sums of backward; what it leaves out comes in afterwards. Products
/// in float64 need none, nor do those of 16 bits, which are exact in float32.
template <class T>
__device__ inline typename Real<T>::type coarse_mean(double mean) {
  if (sizeof(T) == 2 || (FAST_DOUBLE && sizeof(T) == 4)) return 0;
  return static_cast<typename Real<T>::type>(mean);
}

/// Of a channel before the sums of backward are known: slope is rstd.
__device__ inline Gradient known_gradient(const Call& c, long long channel) {
  const double weight = parameter(c.weight, c.weight_type, channel, 1.0), rstd = rstd_of(c, c.var[channel]);
  return {c.mean[channel], c.shift ? c.shift[channel] : 0.0, rstd * weight, rstd, 0.0};
}

struct Corrections {
  double k1, k2;  // dbias / count and dweight / count
};

/// dweight and dbias from the sums of a whole channel, and what dx needs of them.
template <class T, class W>
__device__ inline Corrections finish_gradient(
    const Call& c, long long channel, const Gradient& known, const Sums<W>& sums, bool writes) {
  const double rest = (known.mean - coarse_mean<T>(known.mean)) + known.shift;
  const Pair64 s1 = as_pair(sums.s1), s2 = as_pair(sums.s2) - s1 * rest;
  const double dbias = s1.hi, dweight = (s2 * known.slope).hi;
  if (writes) {
    set_parameter(c.dweight, c.weight_type, channel, dweight);
    set_parameter(c.dbias, c.weight_type, channel, dbias);
  }
  if (!c.training) return {0.0, 0.0};
  return {per_value(c, dbias), per_value(c, dweight)};
}

__device__ inline Gradient gradient_of(const Gradient& known, Corrections k) {
  return {known.mean, known.shift, known.scale, -known.slope * k.k2, -k.k1};
}
