// How a block goes through its part of an array: sums, and then y or dx.

template <class T, int V>
__device__ inline Vector<T, V> load(const void* array, long long offset) {
  return *reinterpret_cast<const Vector<T, V>*>(static_cast<const T*>(array) + offset);
}
template <class T, int V>
__device__ inline void store(void* array, long long offset, const Vector<T, V>& v) {
  *reinterpret_cast<Vector<T, V>*>(static_cast<T*>(array) + offset) = v;
}

/// 0 in the place of the values that are not among `these`.
template <class T, int V>
__device__ inline void keep_only(const Vector<unsigned char, V>& these, Vector<T, V>& of) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (!these.v[j]) of.v[j] = T{};
  }
}

/// The part of a block's positions, first to last of the vectors of its columns. A column is a channel of planes, and
/// of rows one of the `span` values of a channel that lie side by side. At a position, ARRAYS are read: x, and in
/// backward dy. WITH_MASK, only the values at the positions that it shows count, and y and dx are 0 at others.
template <class T, int V, bool ROWS, int READ, bool WITH_MASK>
struct Part {
  using R = typename Real<T>::type;
  using W = typename Wide<R>::type;
  using Values = Vector<T, V>;
  static constexpr int ARRAYS = READ;
  static constexpr int VECTOR = V;
  static constexpr bool NARROW = sizeof(T) == 2;
  static constexpr bool IN_ROWS = ROWS;
  static constexpr bool MASKED = WITH_MASK;
  static constexpr int LANES = ROWS ? V : 1;                 // columns of a thread
  static constexpr int UNROLL = V * sizeof(T) >= 16 ? 2 : (V >= 4 ? 4 : 8) / ARRAYS;  // vectors that are loaded before
                                                                                      // one is used: a tile
  static constexpr int K = ROWS ? UNROLL : UNROLL * V;  // values of a tile per column
  static constexpr int STRIDE = ROWS ? V : 1;           // and the distance between them

  const Call& c;
  long long per_plane, first;
  int size;                     // positions; no memory has 2^31 of a block
  int span, columns, channels;  // the latter two of the block
  long long first_channel;
  long long start, end;  // in the array, of this thread's first column and of the last column of all

  __device__ Part(const Call& c, long long tile, long long part, long long parts) : c(c) {
    per_plane = ROWS ? 1 : c.length / V;
    const long long positions = c.n * per_plane, share = (positions + parts - 1) / parts;
    first = min(part * share, positions);
    size = static_cast<int>(min(share, positions - first));
    span = ROWS && !MASKED ? static_cast<int>(c.length) : 1;
    columns = static_cast<int>(c.width) * LANES;
    channels = columns / span;
    first_channel = tile * channels;
    start = first_channel * c.length + threadIdx.x * (ROWS ? V : c.length);
    end = c.channels * c.length;
  }

  /// False for a thread beyond the last column, which has nothing to do but to wait with the others.
  __device__ bool works() const { return threadIdx.x < c.width && start < end; }
  /// The channel of a column of this thread, counted from the block's first.
  __device__ int channel(int lane) const {
    const int column = static_cast<int>(threadIdx.x * LANES + lane);
    return span == 1 ? column : column / span;
  }
  /// Of the values of this thread at a position, those that the mask shows. Rows have one column a channel.
  __device__ Vector<unsigned char, V> shown(long long position) const {
    if (!ROWS) return load<unsigned char, V>(c.shown, position * V);
    Vector<unsigned char, V> found;
#pragma unroll
    for (int j = 0; j < V; ++j) found.v[j] = c.shown[position];
    return found;
  }
};

/// Steps of a thread through its part: the offset of each position in the array, and the slot in which a block keeps it.
template <class P>
struct Walk {
  int left;                  // positions of this thread, with this one
  unsigned slot, slot_step;  // of all threads of a block, position by position
  unsigned to_next_plane, per_plane, step_in_plane;  // vectors
  long long here;  // the position, of all of a channel; only where MASKED
  long long offset, advance, wrap;

  __device__ explicit Walk(const P& part)
      : slot(threadIdx.y * blockDim.x + threadIdx.x), slot_step(blockDim.y * blockDim.x) {
    const int step = blockDim.y, position = threadIdx.y;
    here = part.first + position;
    left = part.works() && position < part.size ? (part.size - position + step - 1) / step : 0;
    if (P::IN_ROWS || part.c.n == 1) {  // without divisions
      const long long apart = P::IN_ROWS ? part.end : P::VECTOR;
      offset = part.start + here * apart;
      advance = step * apart;
      to_next_plane = per_plane = 1;
      step_in_plane = 0;
      return;
    }
    per_plane = static_cast<unsigned>(part.per_plane);
    step_in_plane = step % per_plane;
    const long long in_plane = here % part.per_plane;
    offset = here / part.per_plane * part.end + part.start + in_plane * P::VECTOR;
    advance = step / per_plane * part.end + step_in_plane * P::VECTOR;
    to_next_plane = per_plane - static_cast<unsigned>(in_plane);
    wrap = part.end - part.c.length;
  }
  __device__ void next() {
    slot += slot_step;
    if (P::MASKED) here += blockDim.y;
    offset += advance;
    if (P::IN_ROWS) return;
    if (step_in_plane < to_next_plane) {
      to_next_plane -= step_in_plane;
    } else {
      to_next_plane += per_plane - step_in_plane;
      offset += wrap;
    }
  }
};

/// Where the vectors of a tile are: of this one and the next, as many as there are. In the place of others is the first.
template <class P, bool WHOLE>
struct Steps {
  int valid;
  unsigned slot[P::UNROLL], last;
  long long here[P::UNROLL], offset[P::UNROLL];

  __device__ explicit Steps(Walk<P>& walk) {
    valid = WHOLE ? P::UNROLL : walk.left;
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) {
      const bool is = WHOLE || u < valid;
      slot[u] = is ? walk.slot : slot[0];
      if (P::MASKED) here[u] = is ? walk.here : here[0];
      offset[u] = is ? walk.offset : offset[0];
      walk.next();
    }
    last = slot[0] + (valid - 1) * walk.slot_step;
    walk.left -= valid;
  }
};

/// Vectors of one block in shared memory, by array and slot. Threads meet only their own there.
template <class P>
struct Kept {
  typename P::Values* memory;
  unsigned slots;

  __device__ bool has(unsigned slot) const { return slot < slots; }
  __device__ bool has_all(const P& part) const { return slots > 0 && part.size * blockDim.x <= slots; }
  __device__ typename P::Values& at(unsigned slot, int array) const { return memory[array * slots + slot]; }
};

/// Training and evaluation: what is summed, what a channel's sums are for, what becomes of a value.
template <class T, int V, bool ROWS, bool MASKED = false>
struct Forward {
  using P = Part<T, V, ROWS, 1, MASKED>;
  using R = typename P::R;
  using W = typename P::W;
  using Values = typename P::Values;
  using Channel = Affine;
  using Function = Normalizer<T>;
  struct Loaded {
    Values of[1], residual;
    Vector<unsigned char, V> shown;
  };

  static __device__ const T* address(const Call& c, int, long long offset) { return static_cast<const T*>(c.x) + offset; }
  /// Whether what is loaded is what is summed.
  static __device__ bool unchanged(const Call&) { return true; }
  static __device__ void load_at(const Call& c, long long offset, Loaded& to) { to.of[0] = load<T, V>(c.x, offset); }
  static __device__ void settle(const Call&, Loaded&) {}
  static __device__ void load_residual(const Call& c, long long offset, Loaded& to) {
    to.residual = load<T, V>(c.residual, offset);
  }
  /// In the place of what is not there: what changes no sum.
  static __device__ Loaded filler(const Loaded& first) {
    Loaded v = first;
    if (!ROWS) {
#pragma unroll
      for (int j = 1; j < V; ++j) v.of[0].v[j] = v.of[0].v[0];
    }
    return v;
  }
  static __device__ R reference(const Call& c, long long channel) { return origin_of<T, MASKED>(c, channel); }
  static __device__ void add(Sums<W>& total, const R (*values)[P::UNROLL * V], int column, int valid, R origin,
                             bool exact) {
    if constexpr (FAST_DOUBLE && sizeof(T) < 8) {
      // From an origin, so that float32's squares do not cancel.
      add_pairs<P::K>(total, valid, [=](int k) {
        const double d = widened(values[0][column + k * P::STRIDE]) - origin;
        return Pair64{d, d};
      });
    } else {
      add_tile<P::K, P::STRIDE, P::NARROW>(total, values[0] + column, valid, origin, exact);
    }
  }

  static __device__ void prefetch(const Call& c, long long channel) { prefetch_channel(c, channel, false); }
  /// What has to be known of a channel before blocks wait for one another: behind that, where y is x, another one may
  /// write over the origin.
  static __device__ Channel before(const Call& c, long long channel) { return before_channel<T, MASKED>(c, channel); }
  static __device__ Channel finish(
      const Call& c, long long channel, const Channel& before, const Sums<W>& sums, bool writes) {
    return finish_channel(c, channel, before, sums, writes);
  }
  static __device__ void commit(const Call& c, long long channel) { commit_last(c, channel); }
  static __device__ Channel known(const Call& c, long long channel) { return known_affine(c, channel); }

  template <bool RESIDUAL>
  static __device__ R result(const Function& normalize, const Loaded& of, int j) {
    const R x = value(of.of[0], j);
    if constexpr (RESIDUAL) return normalize(x, value(of.residual, j));
    return normalize(x);
  }
  template <bool RESIDUAL>
  static __device__ double exact_result(const Channel& channel, const Loaded& of, int j) {
    return exactly(channel, value(of.of[0], j), RESIDUAL ? value(of.residual, j) : R(0));
  }
  static __device__ R activated(R y, R floor) { return at_least(y, floor); }
};

/// The same of backward.
template <class T, int V, bool ROWS, bool MASKED = false>
struct Backward {
  using P = Part<T, V, ROWS, 2, MASKED>;
  using R = typename P::R;
  using W = typename P::W;
  using Values = typename P::Values;
  using Channel = Gradient;
  using Function = Differentiator<T>;
  struct Loaded {
    Values of[2], activated;  // x and dy, and y
    Vector<unsigned char, V> active, shown;
  };

  static __device__ const T* address(const Call& c, int array, long long offset) {
    return static_cast<const T*>(array ? c.dy : c.x) + offset;
  }
  static __device__ bool unchanged(const Call& c) { return !c.activated && !c.active; }
  static __device__ void load_at(const Call& c, long long offset, Loaded& to) {
    to.of[0] = load<T, V>(c.x, offset);
    to.of[1] = load<T, V>(c.dy, offset);
    if (c.activated) to.activated = load<T, V>(c.activated, offset);
    if (c.active) to.active = load<unsigned char, V>(c.active, offset);
  }
  /// dy, behind the mask and the relu.
  static __device__ void settle(const Call& c, Loaded& of) {
    if (c.activated) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (!(value(of.activated, j) > 0)) of.of[1].v[j] = T{};
      }
    }
    if (c.active) keep_only(of.active, of.of[1]);
    if (MASKED) keep_only(of.shown, of.of[1]);
  }
  static __device__ void load_residual(const Call&, long long, Loaded&) {}
  static __device__ Loaded filler(const Loaded& first) {
    Loaded v = first;
    v.of[1] = {};
    return v;
  }
  static __device__ R reference(const Call& c, long long channel) { return coarse_mean<T>(c.mean[channel]); }
  static __device__ void add(Sums<W>& total, const R (*values)[P::UNROLL * V], int column, int valid, R mean, bool) {
    if constexpr (FAST_DOUBLE && sizeof(T) < 8) {
      // Which in float64 needs no origin.
      add_pairs<P::K>(total, valid, [=](int k) {
        const int i = column + k * P::STRIDE;
        return Pair64{widened(values[1][i]), widened(values[0][i])};
      });
    } else {
      add_gradient_tile<P::K, P::STRIDE, P::NARROW>(total, values[1] + column, values[0] + column, mean);
    }
  }

  static __device__ void prefetch(const Call& c, long long channel) { prefetch_channel(c, channel, true); }
  static __device__ Channel before(const Call& c, long long channel) { return known_gradient(c, channel); }
  static __device__ Channel finish(
      const Call& c, long long channel, const Channel& before, const Sums<W>& sums, bool writes) {
    return gradient_of(before, finish_gradient<T>(c, channel, before, sums, writes));
  }
  static __device__ void commit(const Call&, long long) {}
  static __device__ Channel known(const Call& c, long long channel) {
    Corrections k = {0.0, 0.0};
    if (c.corrections) k = {c.corrections[2 * channel], c.corrections[2 * channel + 1]};
    return gradient_of(known_gradient(c, channel), k);
  }

  template <bool>
  static __device__ R result(const Function& differentiate, const Loaded& of, int j) {
    return differentiate(value(of.of[0], j), value(of.of[1], j));
  }
  template <bool>
  static __device__ double exact_result(const Channel& channel, const Loaded& of, int j) {
    return exactly(channel, value(of.of[0], j), value(of.of[1], j));
  }
  static __device__ R activated(R dx, R) { return dx; }
};

/// What is known of a channel, and what follows for its values.
template <class Op>
struct Coefficients {
  typename Op::Channel exact;
  typename Op::Function function;

  __device__ void operator=(const typename Op::Channel& known) {
    exact = known;
    function = typename Op::Function(known);
  }
};

/// A tile, from where it is kept.
template <class Op, class S>
__device__ inline void take(const Kept<typename Op::P>& kept, const S& steps, typename Op::Loaded* loaded) {
#pragma unroll
  for (int u = 0; u < Op::P::UNROLL; ++u) {
#pragma unroll
    for (int a = 0; a < Op::P::ARRAYS; ++a) loaded[u].of[a] = kept.at(steps.slot[u], a);
  }
}
/// A tile, from the arrays.
template <class Op, class S>
__device__ inline void load_all(const typename Op::P& part, const S& steps, typename Op::Loaded* loaded) {
#pragma unroll
  for (int u = 0; u < Op::P::UNROLL; ++u) {
    Op::load_at(part.c, steps.offset[u], loaded[u]);
    if (Op::P::MASKED) loaded[u].shown = part.shown(steps.here[u]);
  }
#pragma unroll
  for (int u = 0; u < Op::P::UNROLL; ++u) Op::settle(part.c, loaded[u]);
}

/// Adds up a tile that is KEPT already, or loads it, and keeps it if there is room for all of it: the loads first, so
/// that none waits for another.
template <class Op, bool WHOLE, bool KEPT>
__device__ inline void sum_tile(const typename Op::P& part, const Kept<typename Op::P>& kept, Walk<typename Op::P>& walk,
                                const typename Op::R* reference, Sums<typename Op::W>* total) {
  using P = typename Op::P;
  const Steps<P, WHOLE> steps(walk);
  typename Op::Loaded loaded[P::UNROLL];
  if (KEPT) {
    take<Op>(kept, steps, loaded);
  } else {
    load_all<Op>(part, steps, loaded);
    if (kept.has(steps.last)) {
#pragma unroll
      for (int u = 0; u < P::UNROLL; ++u) {
#pragma unroll
        for (int a = 0; a < P::ARRAYS; ++a) kept.at(steps.slot[u], a) = loaded[u].of[a];
      }
    }
  }
  if (P::MASKED) {  // a value that is its channel's reference changes no sum
#pragma unroll
    for (int i = 0; i < P::UNROLL * P::VECTOR; ++i) {
      auto& of = loaded[i / P::VECTOR];
      const int j = i % P::VECTOR;
      if (!of.shown.v[j]) round_to(of.of[0].v[j], reference[P::LANES > 1 ? j : 0]);
    }
  }
  if (!WHOLE) {
#pragma unroll
    for (int u = 1; u < P::UNROLL; ++u) {
      if (u >= steps.valid) loaded[u] = Op::filler(loaded[0]);
    }
  }
  typename P::R values[P::ARRAYS][P::UNROLL * P::VECTOR];
#pragma unroll
  for (int a = 0; a < P::ARRAYS; ++a) {
#pragma unroll
    for (int i = 0; i < P::UNROLL * P::VECTOR; ++i) {
      values[a][i] = value(loaded[i / P::VECTOR].of[a], i % P::VECTOR);
    }
  }
  const int valid = (WHOLE ? P::UNROLL : steps.valid) * (P::K / P::UNROLL);
#pragma unroll
  for (int j = 0; j < P::LANES; ++j) Op::add(total[j], values, j, valid, reference[j], part.c.exact);
}

#if ASYNC_COPIES
/// Starts to copy a tile, if there is one, to where it is kept.
template <class Op, bool WHOLE>
__device__ inline void start_tile(
    const typename Op::P& part, const Kept<typename Op::P>& kept, Walk<typename Op::P>& walk) {
  using P = typename Op::P;
#pragma unroll
  for (int u = 0; u < P::UNROLL; ++u) {
    if (!WHOLE && u >= walk.left) break;
#pragma unroll
    for (int a = 0; a < P::ARRAYS; ++a) {
      start_copy<sizeof(typename P::Values)>(&kept.at(walk.slot, a), Op::address(part.c, a, walk.offset));
    }
    walk.next();
  }
  walk.left -= P::UNROLL;
  end_copies();
}

/// `sum_part` where all is kept as it is: some tiles ahead, copied without passing through registers.
template <class Op>
__device__ inline void sum_copies(const typename Op::P& part, const Kept<typename Op::P>& kept, Walk<typename Op::P> walk,
                                  const typename Op::R* reference, Sums<typename Op::W>* total) {
  constexpr int AHEAD = 4;
  Walk<typename Op::P> ahead = walk;
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) start_tile<Op, false>(part, kept, ahead);
  if constexpr (FAST_DOUBLE || Op::P::NARROW) {  // else a tile takes so many instructions that this would not show
    while (ahead.left >= Op::P::UNROLL) {
      await_copies<AHEAD - 1>();
      sum_tile<Op, true, true>(part, kept, walk, reference, total);
      start_tile<Op, true>(part, kept, ahead);
    }
  }
  while (walk.left >= Op::P::UNROLL) {  // of which the last copies are under way, or about to be
    await_copies<AHEAD - 1>();
    sum_tile<Op, true, true>(part, kept, walk, reference, total);
    start_tile<Op, false>(part, kept, ahead);
  }
  await_copies<0>();
  if (walk.left > 0) sum_tile<Op, false, true>(part, kept, walk, reference, total);
}
#endif

/// Sums of a thread over its positions in a part, by column. What fits is kept.
template <class Op>
__device__ inline void sum_part(const typename Op::P& part, const Kept<typename Op::P>& kept,
                                Walk<typename Op::P> walk, Sums<typename Op::W>* total) {
  using P = typename Op::P;
  typename P::R reference[P::LANES];
#pragma unroll
  for (int j = 0; j < P::LANES; ++j) {
    total[j] = {};
    if (part.works()) reference[j] = Op::reference(part.c, part.first_channel + part.channel(j));
  }
#if ASYNC_COPIES
  if constexpr (sizeof(typename P::Values) >= 4 && sizeof(typename P::Values) <= 16) {
    if (kept.has_all(part) && Op::unchanged(part.c)) {
      sum_copies<Op>(part, kept, walk, reference, total);
      return;
    }
  }
#endif
  while (walk.left >= P::UNROLL) sum_tile<Op, true, false>(part, kept, walk, reference, total);
  if (walk.left > 0) sum_tile<Op, false, false>(part, kept, walk, reference, total);
}

/// y or dx of a tile, from what is kept of it, or from the arrays themselves.
template <class Op, bool RESIDUAL, bool WHOLE>
__device__ inline void apply_tile(bool is_kept, const typename Op::P& part, const Kept<typename Op::P>& kept,
                                  Walk<typename Op::P>& walk, const typename Op::Function* function,
                                  const Coefficients<Op>* channels) {
  using P = typename Op::P;
  using R = typename P::R;
  const Call& c = part.c;
  const R floor = c.relu ? R(0) : R(MINUS_INFINITY);
  const Steps<P, WHOLE> steps(walk);
  typename Op::Loaded loaded[P::UNROLL];
  if (is_kept) {
    take<Op>(kept, steps, loaded);
  } else {
    load_all<Op>(part, steps, loaded);
  }
  if (RESIDUAL) {
#pragma unroll
    for (int u = 0; u < P::UNROLL; ++u) Op::load_residual(c, steps.offset[u], loaded[u]);
  }
#pragma unroll
  for (int u = 0; u < P::UNROLL; ++u) {
    if (WHOLE || u < steps.valid) {
      R results[P::VECTOR], check = 0;
#pragma unroll
      for (int j = 0; j < P::VECTOR; ++j) {
        const R result = Op::template result<RESIDUAL>(function[P::LANES > 1 ? j : 0], loaded[u], j);
        if (Op::Function::CHECKED) check = fused(result, R(0), check);  // NaN if one of them is not finite
        results[j] = Op::activated(result, floor);
      }
      if (Op::Function::CHECKED && check != 0) {
#pragma unroll
        for (int j = 0; j < P::VECTOR; ++j) {
          const auto& channel = channels[part.channel(P::LANES > 1 ? j : 0)].exact;
          const double exact = Op::template exact_result<RESIDUAL>(channel, loaded[u], j);
          results[j] = Op::activated(static_cast<R>(exact), floor);
        }
      }
      typename P::Values rounded;
      round_all(rounded, results);
      if (P::MASKED) keep_only(loaded[u].shown, rounded);
      store(c.y, steps.offset[u], rounded);
      if constexpr (P::ARRAYS == 2) {
        if (c.dresidual) store(c.dresidual, steps.offset[u], loaded[u].of[1]);
      }
    }
  }
}

/// The same of a part in float64, where float32 does not suit a channel, from the arrays: nobody else writes there.
template <class Op, bool RESIDUAL>
__device__ inline void apply_exactly(
    const typename Op::P& part, Walk<typename Op::P> walk, const Coefficients<Op>* channels) {
  using P = typename Op::P;
  const float floor = part.c.relu ? 0 : MINUS_INFINITY;
#pragma unroll 1
  for (; walk.left > 0; --walk.left, walk.next()) {
    typename Op::Loaded loaded;
    Op::load_at(part.c, walk.offset, loaded);
    if (P::MASKED) loaded.shown = part.shown(walk.here);
    Op::settle(part.c, loaded);
    if (RESIDUAL) Op::load_residual(part.c, walk.offset, loaded);
    typename P::Values results;
#pragma unroll
    for (int j = 0; j < P::VECTOR; ++j) {
      const auto& channel = channels[part.channel(P::LANES > 1 ? j : 0)].exact;
      const double exact = Op::template exact_result<RESIDUAL>(channel, loaded, j);
      round_to(results.v[j], Op::activated(static_cast<float>(exact), floor));
    }
    if (P::MASKED) keep_only(loaded.shown, results);
    store(part.c.y, walk.offset, results);
    if constexpr (P::ARRAYS == 2) {
      if (part.c.dresidual) store(part.c.dresidual, walk.offset, loaded.of[1]);
    }
  }
}

template <class Op, bool RESIDUAL>
__device__ inline void apply_with(const typename Op::P& part, const Kept<typename Op::P>& kept,
                                  Walk<typename Op::P> walk, const Coefficients<Op>* channels) {
  using P = typename Op::P;
  typename Op::Function function[P::LANES];
#pragma unroll
  for (int j = 0; j < P::LANES; ++j) function[j] = channels[part.channel(j)].function;
  if constexpr (sizeof(typename P::Values) == 2 * P::VECTOR) {
    bool suited = true;
#pragma unroll
    for (int j = 0; j < P::LANES; ++j) suited = suited && function[j].suits();
    if (!suited) {
      apply_exactly<Op, RESIDUAL>(part, walk, channels);
      return;
    }
  }
  const unsigned ahead = (P::UNROLL - 1) * walk.slot_step;
  if constexpr (FAST_DOUBLE || P::NARROW) {  // else a tile takes so many instructions that this would not show
    while (walk.left >= P::UNROLL && kept.has(walk.slot + ahead)) {
      apply_tile<Op, RESIDUAL, true>(true, part, kept, walk, function, channels);
    }
    while (walk.left >= P::UNROLL) apply_tile<Op, RESIDUAL, true>(false, part, kept, walk, function, channels);
  } else {
    while (walk.left >= P::UNROLL) {
      apply_tile<Op, RESIDUAL, true>(kept.has(walk.slot + ahead), part, kept, walk, function, channels);
    }
  }
  if (walk.left > 0) {
    const bool is_kept = kept.has(walk.slot + (walk.left - 1) * walk.slot_step);
    apply_tile<Op, RESIDUAL, false>(is_kept, part, kept, walk, function, channels);
  }
}

/// y or dx of a part.
template <class Op>
__device__ inline void apply_part(const typename Op::P& part, const Kept<typename Op::P>& kept,
                                  const Walk<typename Op::P>& walk, const Coefficients<Op>* channels) {
  if (!part.works()) return;
  if (Op::P::ARRAYS == 1 && part.c.residual) {
    apply_with<Op, true>(part, kept, walk, channels);
  } else {
    apply_with<Op, false>(part, kept, walk, channels);
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
  Coefficients<Op>* channels;
  unsigned char* rest;

  __device__ explicit Shared(const typename Op::P& part) {
    const int sets = blockDim.x > 32 ? blockDim.y : blockDim.x * blockDim.y / 32;
    scratch = reinterpret_cast<Sums<typename Op::W>*>(shared_memory());
    channels = reinterpret_cast<Coefficients<Op>*>(scratch + sets * part.columns);
    rest = reinterpret_cast<unsigned char*>(channels + part.channels);
    rest += -reinterpret_cast<unsigned long long>(rest) & 15;
  }

  __device__ Kept<typename Op::P> kept(const typename Op::P& part) const {
    return {reinterpret_cast<typename Op::P::Values*>(rest), static_cast<unsigned>(part.c.keep) * blockDim.x};
  }
};
