// CUDA on the CPU, as much of it as batchnorm.cu uses: so that g++ compiles that file as it is, and tests run it.
//
// Every CUDA thread is a fiber, a stack of its own that runs until it waits at a barrier. A block runs as far as it can
// before another one of its cluster does, or, in a cooperative launch, another one of the grid. The order of threads and
// of blocks is the *schedule*: forward, backward, or shuffled by a seed. A kernel that is right gives the same bits under
// each. What this finds:
//
//   - a missing barrier: under some schedule a thread reads what is not there yet,
//   - a barrier that not all threads or blocks reach: nobody can go on,
//   - shared memory that nobody wrote, or whose block is gone: it is NaN before a block starts and after it ends,
//   - writes beyond the shared memory of a block: what lies behind it has changed,
//   - vectors loaded or stored where they are not aligned: -fsanitize=alignment calls the handler below,
//   - two threads at one place without a barrier between them, under any schedule, by -fsanitize=thread, and memory that
//     is not the kernel's, by -fsanitize=address: see sanitizers.h, and sanitized.py, which runs it so.
//
// Not covered: what hides behind CUDA_ON_CPU in the .cu (inline PTX, of which the twins are here), the memory model of
// a GPU, and its speed.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "sanitizers.h"

#define CUDA_ON_CPU
#define __device__
#define __global__
#define __launch_bounds__(...)
#define CLUSTER_OF(size)

using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simulator {

/// Fibers that wait for one another. The last one to arrive lets all of them go on.
struct Barrier {
  const char* name = "";
  unsigned expected = 0, arrived = 0;
  uint64_t generation = 0;
  std::shared_ptr<char[]> tokens{new char[2]};  // for `release`, by whether the generation is odd

  char* token(uint64_t of) const { return &tokens[of % 2]; }
};

struct Block {
  dim3 index;
  unsigned rank = 0;  // in its cluster
  std::vector<unsigned char> shared;
  Barrier threads;
  std::vector<Barrier> warps;
  std::vector<double> lanes;  // what the threads show one another in a shuffle
  std::vector<dim3> positions;
};

/// Of a few bytes, which are not there before somebody has waited for them.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  Block* block = nullptr;
  unsigned thread = 0;  // in its block
  bool started = false, done = false;
  Barrier* waits_at = nullptr;
  uint64_t generation = 0;
  const unsigned long long* counter = nullptr;  // in global memory, which it waits to see at `wanted`
  unsigned long long wanted = 0;
  std::vector<std::vector<Copy>> copies{1};  // under way: groups, and what is in none yet
  ucontext_t start;
  jmp_buf resume;
  void* strand = nullptr;
};

constexpr size_t STACK = SANITIZED ? 128 << 10 : 64 << 10;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t GUARD = 0;
#else
constexpr size_t GUARD = 256;
#endif
constexpr unsigned char POISON = 0xFF;  // a NaN in every floating-point type

inline dim3 grid_dim, block_dim;
inline std::vector<Block> cluster;  // or the grid of a cooperative launch: blocks that run at the same time
inline std::vector<Fiber> fibers;
inline std::vector<void*> stacks;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline void* scheduler_strand = nullptr;
inline char finished;  // the token of fibers that are done
inline Barrier cluster_barrier;
inline std::string failure;
inline void (*kernel)(const void*) = nullptr;
inline const void* arguments = nullptr;

inline void fail(const std::string& what) {
  if (failure.empty()) failure = what;
}

inline void switch_to_scheduler() {
#if SANITIZED
  Fiber& fiber = *current;
  follow(scheduler_strand);
  swapcontext(&fiber.start, &scheduler_context);
#else
  if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
#endif
}

/// ORDERS: what was done before is seen behind the barrier by those who wait for it.
template <bool ORDERS = true>
void arrive(Barrier& barrier) {
  const Unseen unseen;
  current->generation = barrier.generation;
  if (ORDERS) release(barrier.token(barrier.generation));
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

/// Even the last one to arrive makes room, so that what comes after a barrier starts in the order of the schedule.
template <bool ORDERS = true>
void wait_for_others(Barrier& barrier) {
  const Unseen unseen;
  char* const token = barrier.token(current->generation);
  current->waits_at = &barrier;
  switch_to_scheduler();
  if (ORDERS) acquire(token);
}

template <bool ORDERS = true>
void wait(Barrier& barrier) {
  arrive<ORDERS>(barrier);
  wait_for_others<ORDERS>(barrier);
}

inline void wait_for(const unsigned long long* counter, unsigned long long wanted) {
  const Unseen unseen;
  current->counter = counter;
  current->wanted = wanted;
  switch_to_scheduler();
  current->counter = nullptr;
  acquire(const_cast<unsigned long long*>(counter));
}

inline void run_fiber() {
  kernel(arguments);
  release(&finished);
  {
    const Unseen unseen;
    current->done = true;
  }
  switch_to_scheduler();
}

inline bool can_run(const Fiber& fiber) {
  if (fiber.counter) return *fiber.counter >= fiber.wanted;
  return !fiber.done && (!fiber.waits_at || fiber.waits_at->generation != fiber.generation);
}

inline void run(Fiber& fiber, void* stack) {
  current = &fiber;
#if !SANITIZED
  if (_setjmp(scheduler)) return;  // the fiber waits or is done
  if (fiber.started) _longjmp(fiber.resume, 1);
#endif
  if (!fiber.started) {
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stack;
    fiber.start.uc_stack.ss_size = STACK;
    makecontext(&fiber.start, run_fiber, 0);
  }
#if SANITIZED
  follow(fiber.strand);
  swapcontext(&scheduler_context, &fiber.start);
#else
  setcontext(&fiber.start);
#endif
}

inline std::string who_waits() {
  std::string names;
  for (const Fiber& fiber : fibers) {
    const std::string name = fiber.done ? "the end" : fiber.counter ? "a barrier of blocks" : fiber.waits_at->name;
    if (names.find(name) == std::string::npos) names += (names.empty() ? "" : " and ") + name;
  }
  return names;
}

template <class Order>
void arrange(Order& order, unsigned schedule, std::mt19937& random) {
  std::iota(order.begin(), order.end(), 0u);
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) std::shuffle(order.begin(), order.end(), random);
}

/// Runs the threads of a block until all of them wait for another block, or are done; where threads are shuffled, some of
/// them, and no further than to their next barrier, so that other blocks come in between. Returns whether any has run.
inline bool run_block(unsigned rank, unsigned schedule, std::mt19937& random) {
  const size_t threads = fibers.size() / cluster.size(), first = rank * threads;
  std::vector<unsigned> order(threads);
  const bool shuffled = schedule > 1;
  bool any = false;
  for (bool moved = true; moved && failure.empty() && !(shuffled && any);) {
    moved = false;
    size_t turns = shuffled ? 1 + random() % threads : threads;
    arrange(order, schedule, random);
    for (unsigned thread : order) {
      if (!turns || !can_run(fibers[first + thread])) continue;
      run(fibers[first + thread], stacks[first + thread]);
      moved = any = true;
      --turns;
    }
  }
  return any;
}

/// The shared memory of a block that is done, which nobody may read any more.
inline void end_block(Block& block) {
  const auto end = block.shared.end();
  if (std::any_of(end - GUARD, end, [](unsigned char c) { return c != POISON; })) {
    fail("a block wrote beyond its shared memory");
  }
  std::fill(block.shared.begin(), end, POISON);
}

/// All blocks of one cluster, from start to end: one of them after the other as far as it goes.
inline void run_cluster(unsigned schedule, std::mt19937& random) {
  const size_t threads = fibers.size() / cluster.size();
  std::vector<unsigned> order(cluster.size());
  std::vector<bool> done(cluster.size());
  for (size_t left = cluster.size(); left && failure.empty();) {
    bool moved = false;
    arrange(order, schedule, random);
    for (unsigned rank : order) {
      if (done[rank] || !run_block(rank, schedule, random)) continue;
      moved = true;
      const auto first = fibers.begin() + rank * threads;
      if (std::all_of(first, first + threads, [](const Fiber& fiber) { return fiber.done; })) {
        done[rank] = true;
        --left;
        end_block(cluster[rank]);
      }
    }
    if (!moved && failure.empty()) fail("divergent barrier: threads wait at " + who_waits());
  }
}

inline void prepare_cluster(uint64_t first, unsigned size, size_t shared_bytes) {
  const unsigned threads = block_dim.x * block_dim.y * block_dim.z;
  cluster_barrier = {"the barrier of the cluster", size * threads};
  cluster.clear();  // and give back what they had: it is nobody's when the next ones get it
  cluster.resize(size);
  for (const Fiber& fiber : fibers) end_strand(fiber.strand);
  fibers.assign(size * threads, {});
  if (SANITIZED) {  // no stack is one that others have had before
    for (void* stack : stacks) munmap(stack, STACK);
    stacks.clear();
  }
  if (stacks.size() < fibers.size()) {
    const size_t more = fibers.size() - stacks.size();
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char* memory = static_cast<char*>(mmap(nullptr, more * STACK, PROT_READ | PROT_WRITE, flags, -1, 0));
    for (size_t i = 0; i < more; ++i) stacks.push_back(memory + i * STACK);
  }
  for (unsigned rank = 0; rank < size; ++rank) {
    Block& block = cluster[rank];
    const uint64_t i = first + rank, plane = i / grid_dim.x;
    block.rank = rank;
    block.index = {unsigned(i % grid_dim.x), unsigned(plane % grid_dim.y), unsigned(plane / grid_dim.y)};
    block.shared.assign(shared_bytes + GUARD, POISON);
    block.threads = {"__syncthreads", threads};
    for (unsigned t = 0; t < threads; t += 32) block.warps.push_back({"a shuffle", min(32u, threads - t)});
    block.lanes.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[rank * threads + t];
      fiber.strand = new_strand();
      fiber.block = &block;
      fiber.thread = t;
      block.positions.push_back({t % block_dim.x, t / block_dim.x % block_dim.y, t / block_dim.x / block_dim.y});
    }
  }
}

/// Subnormal float32 numbers are 0, as CuPy has the compiler make them; float64 ones too, which are not met here.
struct FlushToZero {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before); }
#endif
};

/// Runs a kernel, or of its blocks the last ones alone; returns 0, or 1 with what went wrong.
inline int launch(void (*function)(const void*), const unsigned* grid, const unsigned* block, unsigned cluster_size,
                  bool cooperative, size_t shared_bytes, unsigned schedule, uint64_t last, const void* args, char* error,
                  size_t error_size) {
  const FlushToZero flush;
  const Unseen unseen;
  scheduler_strand = this_strand();
  kernel = function;
  arguments = args;
  failure.clear();
  grid_dim = {grid[0], grid[1], grid[2]};
  block_dim = {block[0], block[1], block[2]};
  const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2], threads = block[0] * block[1] * block[2];
  if (!blocks || !threads || threads > 1024 || threads % 32 || shared_bytes > 227 * 1024) {
    fail("no GPU takes this launch");
  } else if (grid[0] % cluster_size) {
    fail("the grid is not made of whole clusters");
  }
  if (cooperative) cluster_size = blocks;
  std::mt19937 random(schedule);
  for (uint64_t first = blocks - min(last, blocks); first < blocks && failure.empty(); first += cluster_size) {
    prepare_cluster(first, cluster_size, shared_bytes);
    run_cluster(schedule, random);
    if (!failure.empty()) {
      const dim3 at = cluster[0].index;
      failure += " (block " + std::to_string(at.x) + ", " + std::to_string(at.y) + ")";
    }
  }
  acquire(&finished);
  snprintf(error, error_size, "%s", failure.c_str());
  return failure.empty() ? 0 : 1;
}

template <class T>
T shuffle(T value, unsigned source) {
  static_assert(sizeof(T) == sizeof(double), "shuffles of 8 bytes");
  const Unseen unseen;
  Block& block = *current->block;
  const unsigned warp = current->thread / 32;
  memcpy(&block.lanes[current->thread], &value, sizeof value);
  wait<false>(block.warps[warp]);
  memcpy(&value, &block.lanes[warp * 32 + source], sizeof value);
  wait<false>(block.warps[warp]);
  return value;
}

}  // namespace simulator

// -- what a kernel sees -----------------------------------------------------------------------------------------------

#define threadIdx (simulator::current->block->positions[simulator::current->thread])
#define blockIdx (simulator::current->block->index)
#define blockDim (simulator::block_dim)
#define gridDim (simulator::grid_dim)

inline void __syncthreads() { simulator::wait(simulator::current->block->threads); }
inline double __shfl_xor_sync(unsigned mask, double value, int offset) {
  if (mask != ~0u) simulator::fail("a shuffle of half a warp, which the simulator does not know");
  return simulator::shuffle(value, (simulator::current->thread % 32) ^ offset);
}
inline float __int_as_float(int bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
inline int __float_as_int(float v) {
  int bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

// Twins of what the .cu says in PTX.
inline unsigned char* shared_memory() { return simulator::current->block->shared.data(); }
inline void cluster_sync() { simulator::wait(simulator::cluster_barrier); }
inline void cluster_arrive() { simulator::arrive<false>(simulator::cluster_barrier); }  // relaxed
inline void cluster_wait() { simulator::wait_for_others<false>(simulator::cluster_barrier); }
inline void prefetch(const void*) {}
#define ASYNC_COPIES 1
template <int BYTES>
void start_copy(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % BYTES) simulator::fail("misaligned copy");
  const simulator::Unseen unseen;
  simulator::current->copies.back().push_back({to, from, BYTES});
}
inline void end_copies() {
  const simulator::Unseen unseen;
  simulator::current->copies.emplace_back();
}
template <int GROUPS>
void await_copies() {
  auto& groups = simulator::current->copies;
  while (groups.size() > GROUPS + 1) {
    for (const simulator::Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
    const simulator::Unseen unseen;
    groups.erase(groups.begin());
  }
}
/// What these PTX instructions do with subnormal numbers, whatever `FlushToZero` does to the others.
inline double widened(float v) {
  const unsigned bits = __float_as_int(v), size = bits & 0x7FFFFFFF;
  const double w = size < 0x800000 ? size * 0x1p-149 : std::fabs(v);
  return bits >> 31 ? -w : w;
}
inline float narrowed(double v) {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);
  volatile double kept = v;
  volatile float n = static_cast<float>(kept);
  _mm_setcsr(before);
  return n;
#else
  return static_cast<float>(v);
#endif
}
inline float at_least(float v, float floor) { return v <= floor ? floor : v; }
inline double of_rank(const double* p, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(p) - shared_memory();
  double v;
  memcpy(&v, simulator::cluster[rank].shared.data() + offset, sizeof v);
  return v;
}
inline void arrive(unsigned long long* barrier) {
  const simulator::Unseen unseen;
  simulator::release(barrier);
  ++*barrier;
}
inline void await(const unsigned long long* barrier, unsigned long long blocks) { simulator::wait_for(barrier, blocks); }
inline float half_to_float(unsigned short bits) {
  _Float16 v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
inline unsigned short float_to_half(float value) {
  const _Float16 v = static_cast<_Float16>(value);
  unsigned short bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

// What -fsanitize=alignment calls; linked without its library, so that a test sees an error and not an end.
extern "C" inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(void*, void*) {
  simulator::fail("misaligned access");
}
