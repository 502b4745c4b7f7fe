// Runs work on the threads of the OpenMP runtime that PyTorch has loaded: a second runtime would start its own threads
// beside PyTorch's. So nothing is compiled or linked with OpenMP; build.py looks up the runtime's functions and passes
// them in once, after loading a library. Without them the calling thread does all the work.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "platform.h"

// Entry points of an OpenMP runtime, null where it lacks one. LLVM's runtime also has GNU's function to start a team,
// but not on Windows.
struct OpenMP {
    int (*thread_index)();
    int (*thread_count)();
    void (*gnu_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
    void (*llvm_fork)(void* location, int32_t arguments, void (*body)(int32_t*, int32_t*, void*), ...);
    void (*llvm_set_threads)(void* location, int32_t thread, int32_t threads);
    int32_t (*llvm_thread)(void* location);
};
static OpenMP openmp{};

EXPORT int use_openmp(const OpenMP* functions) {
    openmp = *functions;
    return 0;
}

struct Region {
    void (*run)(const void* work, int index, int count);
    const void* work;
    std::atomic<bool> failed{false};
};
static void run_in_team(void* data) {
    Region* region = (Region*)data;
    try {
        region->run(region->work, openmp.thread_index(), openmp.thread_count());
    } catch (...) {  // an exception that leaves a thread of the runtime ends the process
        region->failed = true;
    }
}
static void run_in_llvm_team(int32_t*, int32_t*, void* data) { run_in_team(data); }

static void start_team(Region& region, int threads) {
    if (openmp.gnu_parallel) return openmp.gnu_parallel(run_in_team, &region, unsigned(threads), 0);
    static struct {  // ident_t of LLVM's runtime: the source location of a region
        int32_t reserved = 0, flags = 2, more[2] = {0, 0};
        const char* source = ";unknown;unknown;0;0;;";
    } location;
    openmp.llvm_set_threads(&location, openmp.llvm_thread(&location), threads);
    openmp.llvm_fork(&location, 1, run_in_llvm_team, &region);
}

static void run_region(Region& region, int threads) {
    if (threads <= 1 || !openmp.thread_index) return region.run(region.work, 0, 1);
    start_team(region, threads);
    if (region.failed) throw std::bad_alloc();
}

// Calls work(index, count) once on every thread of a team of at most `threads`; all run at the same time. Throws if one
// of them did.
template <class F> INLINE void on_threads(int threads, const F& work) {
    Region region{[](const void* f, int index, int count) { (*(const F*)f)(index, count); }, &work};
    run_region(region, threads);
}

// calls work(unit) for every unit below `units`, on up to `threads` threads
template <class F> INLINE void parallel(int64_t units, int threads, const F& work) {
    std::atomic<int64_t> next{0};
    on_threads(units > 1 ? threads : 1, [&](int, int) {
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) work(unit);
    });
}
