// What CUDA says in PTX. tests/cuda_cpu has its own of these.

#ifndef CUDA_ON_CPU
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
/// v in the other type. As C++ has it, each would be a multiplication more, which makes subnormal numbers 0 (-ftz=true).
__device__ inline double widened(float v) {
  double w;
  asm("cvt.f64.f32 %0, %1;" : "=d"(w) : "f"(v));
  return w;
}
__device__ inline float narrowed(double v) {
  float n;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(n) : "d"(v));
  return n;
}
/// The larger one; NaN if v is.
__device__ inline float at_least(float v, float floor) {
#if __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(v), "f"(floor));
  return larger;
#else
  return v <= floor ? floor : v;
#endif
}
/// Brings what will be read nearer.
__device__ inline void prefetch(const void* p) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}
#if __CUDA_ARCH__ >= 800
#define ASYNC_COPIES 1
/// Starts a copy of 4, 8 or 16 bytes from global to shared memory, which takes no registers.
template <int BYTES>
__device__ inline void start_copy(void* to, const void* from) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(BYTES) : "memory");
  }
}
/// The copies of this thread since the last time are a group.
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until no more than so many groups of this thread, the last ones, are still under way.
template <int GROUPS>
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
#else
#define ASYNC_COPIES 0
#endif
/// Counts this block at a barrier in global memory, behind all that its threads did before they met.
__device__ inline void arrive(unsigned long long* barrier) {
  asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(barrier) : "memory");
}
/// Waits until so many blocks have been counted; what they did before is seen from here on.
__device__ inline void await(const unsigned long long* barrier, unsigned long long blocks) {
  unsigned long long arrived;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(arrived) : "l"(barrier) : "memory");
  } while (arrived < blocks);
}
#if __CUDA_ARCH__ >= 900
#define CLUSTER_OF(size) __cluster_dims__(size, 1, 1)
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// The same in two halves, for blocks of which none has written anything that others read.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
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
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {}
__device__ inline double of_rank(const double* p, int) { return *p; }
#endif
#endif
