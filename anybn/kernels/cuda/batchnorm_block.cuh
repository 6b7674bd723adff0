// How a block goes through its part of an array: sums, and then y or dx.

/// The part of a block's positions, first to last of the vectors of its columns. A column is a channel of planes, and
/// of rows one of the `span` values of a channel that lie side by side. At a position, ARRAYS are read: x, and in
/// backward dy.
template <class T, int V, bool ROWS, int READ>
struct Part {
  using R = typename Real<T>::type;
  using W = typename Wide<R>::type;
  using Values = Vector<T, V>;
  static constexpr int ARRAYS = READ;
  static constexpr int VECTOR = V;
  static constexpr int LANES = ROWS ? V : 1;  // columns of a thread
  static constexpr int UNROLL = (V >= 8 ? 2 : V >= 4 ? 4 : 8) / ARRAYS;  // vectors of a tile
  static constexpr int K = ROWS ? UNROLL : UNROLL * V;  // values of a tile per column
  static constexpr int STRIDE = ROWS ? V : 1;           // and the distance between them

  struct Loaded {
    Values of[ARRAYS];
  };

  const Call& c;
  long long per_plane, first, last;
  int span, columns, channels;  // the latter two of the block
  long long first_channel;
  long long start, end;  // in the array, of this thread's first column and of the last column of all

  __device__ Part(const Call& c, long long tile, long long part, long long parts) : c(c) {
    per_plane = ROWS ? 1 : c.length / V;
    const long long positions = c.n * per_plane, share = (positions + parts - 1) / parts;
    first = min(part * share, positions);
    last = min(first + share, positions);
    span = ROWS ? static_cast<int>(c.length) : 1;
    columns = static_cast<int>(c.width) * LANES;
    channels = columns / span;
    first_channel = tile * channels;
    start = first_channel * c.length + threadIdx.x * (ROWS ? V : c.length);
    end = c.channels * c.length;
  }

  /// False for a thread beyond the last column, which has nothing to do but to wait with the others.
  __device__ bool works() const { return threadIdx.x < c.width && start < end; }
  /// The channel of a column of this thread, counted from the block's first.
  __device__ int channel(int lane) const { return static_cast<int>(threadIdx.x * LANES + lane) / span; }
};

/// Steps of a thread through its part, with the offset of each position in the array.
template <class P>
struct Walk {
  long long position, last, offset, in_plane;
  long long per_plane, step_in_plane, advance, wrap;

  __device__ explicit Walk(const P& part) : position(part.first + threadIdx.y), last(part.last) {
    const long long step = blockDim.y;
    per_plane = part.per_plane;
    in_plane = position % per_plane;
    step_in_plane = step % per_plane;
    offset = position / per_plane * part.end + part.start + in_plane * P::VECTOR;
    advance = step / per_plane * part.end + step_in_plane * P::VECTOR;
    wrap = part.end - part.c.length;
    if (!part.works()) last = position;
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

/// Vectors of one block in shared memory, by array and position. Threads meet only their own there.
template <class P>
struct Kept {
  typename P::Values* memory;
  long long first, count;

  __device__ bool has(long long position) const { return position - first < count; }
  __device__ typename P::Values& at(long long position, int array) const {
    return memory[static_cast<int>(array * count + position - first) * blockDim.x + threadIdx.x];
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

/// Training and evaluation: what is summed, what a channel's sums are for, what becomes of a value.
template <class T, int V, bool ROWS>
struct Forward {
  using P = Part<T, V, ROWS, 1>;
  using R = typename P::R;
  using W = typename P::W;
  using Values = typename P::Values;
  using Loaded = typename P::Loaded;
  using Channel = Affine;
  using Function = Normalizer<T>;

  static __device__ Values load_x(const Call& c, long long offset) { return load<T, V>(c.x, offset); }
  static __device__ Loaded load_at(const Call& c, long long offset) { return {load_x(c, offset)}; }
  /// In the place of what is not there: what changes no sum.
  static __device__ Loaded filler(const Loaded& first) {
    Loaded v = first;
    if (!ROWS) {
#pragma unroll
      for (int j = 1; j < V; ++j) v.of[0].v[j] = v.of[0].v[0];
    }
    return v;
  }
  static __device__ R reference(const Call& c, long long channel) { return origin_of<T>(c, channel); }
  static __device__ void add(Sums<W>& total, const R (*values)[P::UNROLL * V], int column, int valid, R origin,
                             bool exact) {
    add_tile<P::K, P::STRIDE>(total, values[0] + column, valid, origin, exact);
  }

  /// What has to be known of a channel before blocks wait for one another: behind that, where y is x, another one may
  /// write over the origin.
  static __device__ Channel before(const Call& c, long long channel) { return {origin_of<T>(c, channel), 0, 0, 0}; }
  static __device__ Channel finish(const Call& c, long long channel, Channel before, const Sums<W>& sums, bool writes) {
    return finish_channel(c, channel, static_cast<R>(before.mean), sums, writes);
  }
  static __device__ Channel known(const Call& c, long long channel) { return known_affine(c, channel); }

  static __device__ Values load_other(const Call& c, long long offset) {
    return c.residual ? load<T, V>(c.residual, offset) : Values{};
  }
  static __device__ R result(const Call& c, const Function& normalize, R x, R residual) {
    const R y = normalize(x, residual);
    return c.relu && y <= 0 ? R(0) : y;  // keeps NaN
  }
};

/// The same of backward.
template <class T, int V, bool ROWS>
struct Backward {
  using P = Part<T, V, ROWS, 2>;
  using R = typename P::R;
  using W = typename P::W;
  using Values = typename P::Values;
  using Loaded = typename P::Loaded;
  using Channel = Gradient;
  using Function = Differentiator<T>;

  static __device__ Values load_x(const Call& c, long long offset) { return load<T, V>(c.x, offset); }
  static __device__ Loaded load_at(const Call& c, long long offset) {
    return {load_x(c, offset), load_other(c, offset)};
  }
  static __device__ Loaded filler(const Loaded& first) { return {first.of[0], {}}; }
  static __device__ R reference(const Call& c, long long channel) { return coarse_mean<T>(c, channel); }
  static __device__ void add(Sums<W>& total, const R (*values)[P::UNROLL * V], int column, int, R mean, bool) {
    add_gradient_tile<P::K, P::STRIDE>(total, values[1] + column, values[0] + column, mean);
  }

  static __device__ Channel before(const Call&, long long) { return {}; }
  static __device__ Channel finish(const Call& c, long long channel, Channel, const Sums<W>& sums, bool writes) {
    return gradient_of(c, channel, finish_gradient<T>(c, channel, sums, writes));
  }
  static __device__ Channel known(const Call& c, long long channel) {
    Corrections k = {0.0, 0.0};
    if (c.corrections) k = {c.corrections[2 * channel], c.corrections[2 * channel + 1]};
    return gradient_of(c, channel, k);
  }

  /// dy, behind the relu.
  static __device__ Values load_other(const Call& c, long long offset) {
    Values dy = load<T, V>(c.dy, offset);
    if (c.active) {
      const Vector<unsigned char, V> active = load<unsigned char, V>(c.active, offset);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (!active.v[j]) dy.v[j] = T{};
      }
    }
    return dy;
  }
  static __device__ R result(const Call&, const Function& differentiate, R x, R dy) { return differentiate(dy, x); }
};

/// Sums of a thread over its positions in a part, by column. What fits is kept.
template <class Op>
__device__ inline void sum_part(
    const typename Op::P& part, const Kept<typename Op::P>& kept, Sums<typename Op::W>* total) {
  using P = typename Op::P;
  using R = typename P::R;
  R reference[P::LANES];
#pragma unroll
  for (int j = 0; j < P::LANES; ++j) {
    total[j] = {};
    if (part.works()) reference[j] = Op::reference(part.c, part.first_channel + part.channel(j));
  }
  for (Walk<P> walk(part); walk.inside();) {
    typename P::Loaded loaded[P::UNROLL];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) {
      if (walk.inside()) {
        loaded[u] = Op::load_at(part.c, walk.offset);
        if (kept.has(walk.position)) {
#pragma unroll
          for (int a = 0; a < P::ARRAYS; ++a) kept.at(walk.position, a) = loaded[u].of[a];
        }
        ++valid;
      } else {
        loaded[u] = Op::filler(loaded[0]);
      }
      walk.next();
    }
    R values[P::ARRAYS][P::UNROLL * P::VECTOR];
#pragma unroll
    for (int a = 0; a < P::ARRAYS; ++a) {
#pragma unroll
      for (int i = 0; i < P::UNROLL * P::VECTOR; ++i) {
        values[a][i] = value(loaded[i / P::VECTOR].of[a].v[i % P::VECTOR]);
      }
    }
#pragma unroll
    for (int j = 0; j < P::LANES; ++j) {
      Op::add(total[j], values, j, valid * (P::K / P::UNROLL), reference[j], part.c.exact);
    }
  }
}

/// y or dx of a part, from what is kept of it and, beyond that, from the arrays themselves.
template <class Op>
__device__ inline void apply_part(
    const typename Op::P& part, const Kept<typename Op::P>& kept, const typename Op::Channel* channels) {
  using P = typename Op::P;
  if (!part.works()) return;
  const Call& c = part.c;
  typename Op::Function function[P::LANES];
#pragma unroll
  for (int j = 0; j < P::LANES; ++j) function[j] = typename Op::Function(channels[part.channel(j)]);
  for (Walk<P> walk(part); walk.inside();) {
    typename P::Values x[P::UNROLL], other[P::UNROLL];  // the residual, or dy
    long long offset[P::UNROLL];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) {
      if (walk.inside()) {
        const bool has = kept.has(walk.position);
        offset[u] = walk.offset;
        x[u] = has ? kept.at(walk.position, 0) : Op::load_x(c, walk.offset);
        other[u] = has && P::ARRAYS == 2 ? kept.at(walk.position, 1) : Op::load_other(c, walk.offset);
        ++valid;
      }
      walk.next();
    }
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) {
      if (u < valid) {
        if (P::ARRAYS == 2 && c.dresidual) store(c.dresidual, offset[u], other[u]);
#pragma unroll
        for (int j = 0; j < P::VECTOR; ++j) {
          const auto& of = function[P::LANES > 1 ? j : 0];
          round_to(x[u].v[j], Op::result(c, of, value(x[u].v[j]), value(other[u].v[j])));
        }
        store(c.y, offset[u], x[u]);
      }
    }
  }
}

/// Adds up what the threads of a block have per column: threads of a warp that share a column, then warps in order; then
/// the columns of a channel. `scratch` has room for the columns as often as there are such sets of threads. The totals
/// are left at scratch[t * span] for each channel t, where the thread sees them that runs over t in steps of a block.
template <class P, class W>
__device__ inline void sum_block(const P& part, Sums<W>* mine, Sums<W>* scratch) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int width = blockDim.x, lane = thread % 32, warp = thread / 32, columns = part.columns, span = part.span;
  const bool wide_block = width > 32;  // then no two threads of a warp share a column
  const int sets = wide_block ? blockDim.y : threads / 32, set = wide_block ? threadIdx.y : warp;
  for (int offset = 16; offset >= width; offset /= 2) {
#pragma unroll
    for (int j = 0; j < P::LANES; ++j) mine[j] += {shuffled(mine[j].s1, offset), shuffled(mine[j].s2, offset)};
  }
  if (wide_block ? threadIdx.x < part.c.width : lane < width) {
#pragma unroll
    for (int j = 0; j < P::LANES; ++j) scratch[set * columns + threadIdx.x * P::LANES + j] = mine[j];
  }
  __syncthreads();
  if (span == 1) {
    for (int t = thread; t < columns; t += threads) {
      for (int s = 1; s < sets; ++s) scratch[t] += scratch[s * columns + t];
    }
    return;
  }
  for (int t = warp; t < part.channels; t += threads / 32) {
    Sums<W> total = {};
    for (int s = 0; s < sets; ++s) {
      for (int i = lane; i < span; i += 32) total += scratch[s * columns + t * span + i];
    }
    total = sum_warp(total);
    if (lane == 0) scratch[t * span] = total;
  }
  __syncthreads();
}

/// A block's shared memory: scratch of `sum_block`, then something per channel of the block, then what is kept.
template <class Op>
struct Shared {
  Sums<typename Op::W>* scratch;
  typename Op::Channel* channels;
  unsigned char* rest;

  __device__ explicit Shared(const typename Op::P& part) {
    const int sets = blockDim.x > 32 ? blockDim.y : blockDim.x * blockDim.y / 32;
    scratch = reinterpret_cast<Sums<typename Op::W>*>(shared_memory());
    channels = reinterpret_cast<typename Op::Channel*>(scratch + sets * part.columns);
    rest = reinterpret_cast<unsigned char*>(channels + part.channels);
    rest += -reinterpret_cast<unsigned long long>(rest) & 15;
  }

  __device__ Kept<typename Op::P> kept(const typename Op::P& part) const {
    return {reinterpret_cast<typename Op::P::Values*>(rest), part.first, part.c.keep};
  }
};
