// Differences between compilers, processors and operating systems, except for vectors.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

// Functions that Python calls; all others stay inside the library. What they return is -1 if they failed, for want of
// memory: build.py then raises MemoryError.
#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The status of work(): 0, or -1 if it threw, which here only happens where memory cannot be had.
template <class F> INLINE int status(const F& work) {
    try {
        work();
        return 0;
    } catch (...) {
        return -1;
    }
}

// tells the processor that this thread spins, waiting for another
INLINE void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}
