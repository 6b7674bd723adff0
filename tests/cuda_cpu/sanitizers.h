// What the simulator tells ThreadSanitizer: which fiber runs, and what orders memory between fibers. Nothing else does:
// two threads of a kernel that meet at a place without a barrier between them are a race, under whatever schedule.
// Compiled without it, none of this does anything.
#pragma once

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1  // stacks are changed by swapcontext, which sanitizers know
#else
#define SANITIZED 0
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned);
void* __tsan_get_current_fiber();
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace simulator {

#if defined(__SANITIZE_THREAD__)
inline void* new_strand() { return __tsan_create_fiber(0); }
inline void* this_strand() { return __tsan_get_current_fiber(); }
inline void end_strand(void* strand) { __tsan_destroy_fiber(strand); }
inline void follow(void* strand) { __tsan_switch_to_fiber(strand, 1); }  // 1: which orders nothing
/// What this fiber did comes before what any other does that acquires `token` later.
inline void release(void* token) { __tsan_release(token); }
inline void acquire(void* token) { __tsan_acquire(token); }
/// The simulator's own reads and writes, as long as it lives.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
};
#else
inline void* new_strand() { return nullptr; }
inline void* this_strand() { return nullptr; }
inline void end_strand(void*) {}
inline void follow(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
struct Unseen {
  Unseen() {}
};
#endif

}  // namespace simulator
