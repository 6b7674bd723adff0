// A call, and what is done to one value and one channel.

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
  void* partials;                            // Sums of a block, (channels, parts)
  double* corrections;                       // of finish_backward: (channels, 2); null: all 0
  unsigned long long* barriers;              // of groups of blocks: (groups,)
  long long n, channels, length;
  long long parts;  // blocks per channel of kernels that write partials: their gridDim.y
  long long keep;   // positions that a block keeps in shared memory
  long long width;  // threads of a block along channels that have something to do, of blockDim.x
  long long ddof;
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
