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
/// Counts this block at a barrier in global memory, behind all that its threads did before they met.
__device__ inline void arrive(unsigned long long* barrier) {
  asm volatile("red.release.gpu.add.u64 [%0], 1;" ::"l"(barrier) : "memory");
}
/// Waits until so many blocks have been counted; what they did before is seen from here on.
__device__ inline void await(const unsigned long long* barrier, unsigned long long blocks) {
  unsigned long long arrived;
  do {
    asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(arrived) : "l"(barrier) : "memory");
  } while (arrived < blocks);
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
