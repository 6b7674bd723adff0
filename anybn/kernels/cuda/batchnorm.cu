// Batch norm for CUDA arrays: training, evaluation and backward.
//
// x lies in memory as (n, channels, length). Channels-first arrays are *planes*, with length values of a channel side
// by side; channels-last and (N, C) arrays are *rows*, with length 1 and neighbouring channels side by side. Planes
// whose length no vector divides, 7x7 above all, are rows as well, of channels * length columns. A block works on a
// *tile*, which is one channel of planes, or a few if they are tiny, or some neighbouring columns of rows, and on one
// *part* of its positions. A position is a vector of V values: of one channel in planes, of V columns in rows.
//
//   train, backward                            one launch: a cluster of blocks per tile reads x into shared memory
//   train_group, backward_group                the same of any number of blocks, for tiles that a cluster cannot hold
//   sums, finish_train, evaluate               training in two passes over x, for those that the GPU cannot hold
//   gradient_sums, finish_backward, gradients  backward, likewise
//                                              both also MASKED: by a mask that all channels share
//   evaluate                                   evaluation
//   commit                                     the running statistics alone
//
// The files: batchnorm_device (PTX), batchnorm_numbers (arithmetic), batchnorm_channel (a call; one value, one channel),
// batchnorm_block (a block's part of an array), and the kernels, here. _cuda.source() puts them together.
//
// Every order of summation is fixed by the launch: the results are the same bits from run to run.
//
// Loads. A tile of vectors is loaded before one of them is used. Where all of a part is kept, it is copied to shared
// memory without passing through registers, several tiles ahead of the sums.
//
// Arithmetic. Where float64 is fast (`FAST_DOUBLE`), sums are taken in it, and float32 is normalized in it. On other GPUs
// it is used per tile (the K values that a thread holds) and per channel; per value only where x is float64, where
// float32 overflows, and in arrays so small that it takes no time (`exact`). There, what float32 would lose is carried
// along as its rounding error: `two_sum` (Knuth 1969) and `two_prod` (Dekker 1971, with fma) are exact. So y and dx of
// float32 data are what float64 arithmetic gives from the same statistics, rounded once, but for about one value in a
// million. 16-bit data is normalized in plain float32. This must be compiled with --fmad=false: a contracted two_sum is
// not exact.

#include "batchnorm_device.cuh"
#include "batchnorm_numbers.cuh"
#include "batchnorm_channel.cuh"
#include "batchnorm_block.cuh"

// With the number of blocks per multiprocessor, without which the compiler spills in order to have more of them.
constexpr int MOST_THREADS = 512;       // of a block that keeps something
constexpr int STREAMING_THREADS = 256;  // of one that does not: as in plan.py
/// Blocks of a multiprocessor for which a kernel on values of T gets registers, as in plan.py.
template <class T, int V, bool ROWS>
constexpr int MOST_BLOCKS(bool forward) {
  return forward && !ROWS && V > 1 && sizeof(T) < 8 ? 2 : 1;
}
constexpr int STREAMING_BLOCKS(bool forward, bool many_registers) {
  return !forward ? 2 : !many_registers ? 4 : FAST_DOUBLE ? 3 : 2;  // what is in two floats takes more of them
}

// -- one launch -------------------------------------------------------------------------------------------------------

/// The total of a channel over the blocks of the cluster, in the order of their ranks.
template <class W>
__device__ inline Sums<W> sum_cluster(const Sums<W>* scratch, int cluster) {
  if (cluster == 1) return *scratch;
  Sums<W> total = {};
  for (int rank = 0; rank < cluster; ++rank) {
    add_rank(total.s1, &scratch->s1, rank);
    add_rank(total.s2, &scratch->s2, rank);
  }
  return total;
}

/// A cluster of blocks, one after the other in the grid, for each tile.
template <class Op>
__device__ inline void by_cluster(const Call& c, int cluster) {
  const int rank = blockIdx.x % cluster, thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y;
  const typename Op::P part(c, blockIdx.x / cluster, rank, cluster);
  const int channels = static_cast<int>(min(static_cast<long long>(part.channels), c.channels - part.first_channel));
  for (int t = thread; t < channels; t += threads) Op::prefetch(c, part.first_channel + t);
  const Walk<typename Op::P> walk(part);
  const Shared<Op> shared(part);
  const auto kept = shared.kept(part);

  Sums<typename Op::W> mine[Op::P::LANES];
  sum_part<Op>(part, kept, walk, mine);
  sum_block(part, mine, shared.scratch);
  for (int t = thread; t < channels; t += threads) shared.channels[t].exact = Op::before(c, part.first_channel + t);
  if (cluster > 1) cluster_sync();
  for (int t = thread; t < channels; t += threads) {
    const auto sums = sum_cluster(shared.scratch + t * part.span, cluster);
    shared.channels[t] = Op::finish(c, part.first_channel + t, shared.channels[t].exact, sums, rank == 0);
  }
  __syncthreads();
  if (cluster > 1) cluster_arrive();
  apply_part<Op>(part, kept, walk, shared.channels);
  if (rank == 0) {
    for (int t = thread; t < channels; t += threads) Op::commit(c, part.first_channel + t);
  }
  if (cluster > 1) cluster_wait();  // the others may still be reading this block's sums
}

template <class T, int V, bool ROWS, int CLUSTER>
__global__ void CLUSTER_OF(CLUSTER) __launch_bounds__(MOST_THREADS, MOST_BLOCKS<T, V, ROWS>(true)) train(const Call c) {
  by_cluster<Forward<T, V, ROWS>>(c, CLUSTER);
}
template <class T, int V, bool ROWS, int CLUSTER>
__global__ void CLUSTER_OF(CLUSTER) __launch_bounds__(MOST_THREADS, MOST_BLOCKS<T, V, ROWS>(false)) backward(const Call c) {
  by_cluster<Backward<T, V, ROWS>>(c, CLUSTER);
}

// -- partial sums -----------------------------------------------------------------------------------------------------

/// The sums of a block, written to (channels, parts).
template <class Op>
__device__ inline void write_partials(const typename Op::P& part, Sums<typename Op::W>* mine, const Shared<Op>& shared) {
  const Call& c = part.c;
  const int threads = blockDim.x * blockDim.y;
  sum_block(part, mine, shared.scratch);
  for (int t = threadIdx.y * blockDim.x + threadIdx.x; t < part.channels; t += threads) {
    const long long channel = part.first_channel + t;
    if (channel >= c.channels) break;
    static_cast<Sums<typename Op::W>*>(c.partials)[channel * c.parts + blockIdx.y] = shared.scratch[t * part.span];
  }
}

/// The sums of a channel over all parts, in a fixed order, by one warp; every lane gets them.
template <class W>
__device__ inline Sums<W> sum_partials(const Call& c, long long channel) {
  constexpr int AT_ONCE = sizeof(W) == 8 ? 5 : 2;  // loads before one is used: all 132 parts of a large GPU
  const int lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32;
  const Sums<W>* const partials = static_cast<const Sums<W>*>(c.partials) + channel * c.parts;
  Sums<W> total = {};
  for (long long first = lane; first < c.parts; first += 32 * AT_ONCE) {
    Sums<W> loaded[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) loaded[i] = first + 32 * i < c.parts ? partials[first + 32 * i] : Sums<W>{};
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) total += loaded[i];
  }
  return sum_warp(total);
}

// -- groups of blocks -------------------------------------------------------------------------------------------------

constexpr int BARRIERS_APART = 16;  // a line of the cache for each

/// Before a kernel of groups: nobody has come to any barrier yet.
__global__ void __launch_bounds__(32, 1) clear_barriers(const Call c) {
  if (threadIdx.x == 0) c.barriers[BARRIERS_APART * blockIdx.x] = 0;
}

/// Waits until all blocks of this block's group have come here so many times, this one included. The barrier only
/// counts, so there is nothing to set back. All blocks of the grid must be resident at once, which is for the launch to
/// see to: what waits here makes no room for others.
__device__ inline void group_sync(unsigned long long* barrier, long long times) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    arrive(barrier);
    await(barrier, static_cast<unsigned long long>(times * gridDim.y));
  }
  __syncthreads();
}

/// Groups of gridDim.y blocks; group blockIdx.x takes every gridDim.x-th tile. Each tile has its own partials, so that
/// one barrier is enough: nobody writes to what others may still be reading.
template <class Op>
__device__ inline void by_group(const Call& c) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int round = 0;; ++round) {
    const long long tile = blockIdx.x + static_cast<long long>(round) * gridDim.x;
    const typename Op::P part(c, tile, blockIdx.y, gridDim.y);
    if (part.first_channel >= c.channels) return;
    const int channels = static_cast<int>(min(static_cast<long long>(part.channels), c.channels - part.first_channel));
    for (int t = thread; t < channels; t += threads) Op::prefetch(c, part.first_channel + t);
    const Walk<typename Op::P> walk(part);
    const Shared<Op> shared(part);
    const auto kept = shared.kept(part);

    Sums<typename Op::W> mine[Op::P::LANES];
    sum_part<Op>(part, kept, walk, mine);
    write_partials<Op>(part, mine, shared);
    for (int t = thread; t < channels; t += threads) shared.channels[t].exact = Op::before(c, part.first_channel + t);
    group_sync(c.barriers + BARRIERS_APART * blockIdx.x, round + 1);
    for (int t = thread / 32; t < channels; t += threads / 32) {
      const auto sums = sum_partials<typename Op::W>(c, part.first_channel + t);
      if (thread % 32 == 0) shared.scratch[t] = sums;
    }
    __syncthreads();
    for (int t = thread; t < channels; t += threads) {
      const long long channel = part.first_channel + t;
      shared.channels[t] = Op::finish(c, channel, shared.channels[t].exact, shared.scratch[t], blockIdx.y == 0);
    }
    __syncthreads();
    apply_part<Op>(part, kept, walk, shared.channels);
    if (blockIdx.y == 0) {
      for (int t = thread; t < channels; t += threads) Op::commit(c, part.first_channel + t);
    }
  }
}

template <class T, int V, bool ROWS>
__global__ void __launch_bounds__(MOST_THREADS, MOST_BLOCKS<T, V, ROWS>(true)) train_group(const Call c) {
  by_group<Forward<T, V, ROWS>>(c);
}
template <class T, int V, bool ROWS>
__global__ void __launch_bounds__(MOST_THREADS, MOST_BLOCKS<T, V, ROWS>(false)) backward_group(const Call c) {
  by_group<Backward<T, V, ROWS>>(c);
}

// -- two passes -------------------------------------------------------------------------------------------------------

template <class Op>
__device__ inline void first_pass(const Call& c) {
  const typename Op::P part(c, blockIdx.x, blockIdx.y, gridDim.y);
  Sums<typename Op::W> mine[Op::P::LANES];
  sum_part<Op>(part, Kept<typename Op::P>{}, Walk<typename Op::P>(part), mine);
  write_partials<Op>(part, mine, Shared<Op>(part));
}

template <class T, int V, bool ROWS, bool MASKED = false>
__global__ void __launch_bounds__(STREAMING_THREADS, STREAMING_BLOCKS(true, ROWS)) sums(const Call c) {
  first_pass<Forward<T, V, ROWS, MASKED>>(c);
}
template <class T, int V, bool ROWS, bool MASKED = false>
__global__ void __launch_bounds__(STREAMING_THREADS, STREAMING_BLOCKS(false, ROWS)) gradient_sums(const Call c) {
  first_pass<Backward<T, V, ROWS, MASKED>>(c);
}

/// A warp per channel: blocks of (32, warps).
template <class T, bool MASKED = false>
__global__ void __launch_bounds__(STREAMING_THREADS, 2) finish_train(const Call c) {
  using W = typename Wide<typename Real<T>::type>::type;
  const long long channel = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (channel >= c.channels) return;
  const Sums<W> sums = sum_partials<W>(c, channel);
  if (threadIdx.x > 0) return;
  const Call of_shown = counted<MASKED>(c);
  finish_channel(of_shown, channel, before_channel<T, MASKED>(c, channel), sums, true);
  commit_last(of_shown, channel);
}

template <class T, bool MASKED = false>
__global__ void __launch_bounds__(STREAMING_THREADS, 2) finish_backward(const Call c) {
  using W = typename Wide<typename Real<T>::type>::type;
  const long long channel = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (channel >= c.channels) return;
  const Sums<W> sums = sum_partials<W>(c, channel);
  if (threadIdx.x > 0) return;
  const Corrections k = finish_gradient<T>(counted<MASKED>(c), channel, known_gradient(c, channel), sums, true);
  c.corrections[2 * channel] = k.k1;
  c.corrections[2 * channel + 1] = k.k2;
}

/// From what is known of the channels.
template <class Op>
__device__ inline void second_pass(const Call& c) {
  const typename Op::P part(c, blockIdx.x, blockIdx.y, gridDim.y);
  auto* const channels = reinterpret_cast<Coefficients<Op>*>(shared_memory());
  const int threads = blockDim.x * blockDim.y;
  for (int t = threadIdx.y * blockDim.x + threadIdx.x; t < part.channels; t += threads) {
    if (part.first_channel + t < c.channels) channels[t] = Op::known(c, part.first_channel + t);
  }
  __syncthreads();
  apply_part<Op>(part, Kept<typename Op::P>{}, Walk<typename Op::P>(part), channels);
}

template <class T, int V, bool ROWS, bool MASKED = false>
__global__ void __launch_bounds__(STREAMING_THREADS, STREAMING_BLOCKS(true, ROWS || (MASKED && V == 1)))
    evaluate(const Call c) {
  second_pass<Forward<T, V, ROWS, MASKED>>(c);
}
template <class T, int V, bool ROWS, bool MASKED = false>
__global__ void __launch_bounds__(STREAMING_THREADS, STREAMING_BLOCKS(false, ROWS)) gradients(const Call c) {
  second_pass<Backward<T, V, ROWS, MASKED>>(c);
}

// -- running statistics -----------------------------------------------------------------------------------------------

/// The running statistics and the counter alone. One block, since every channel may need the counter as it was.
__global__ void __launch_bounds__(MOST_THREADS, 1) commit(const Call c) {
  const double momentum = c.cumulative ? 1.0 / static_cast<double>(*c.counter + 1) : c.momentum;
  for (long long channel = threadIdx.x; channel < c.channels; channel += blockDim.x) {
    commit_channel(c, channel, momentum);
  }
  __syncthreads();
  if (c.counter && threadIdx.x == 0) *c.counter += 1;
}
