// A team of threads that runs one computation together, and its working memory.
#pragma once

#include <atomic>
#include <memory>
#include <new>
#include <thread>

#include "matmul.h"
#include "threads.h"

// One of `count` threads. All run the same code, each on its share, and wait() is a barrier: a layer takes a handful of
// microseconds, so threads spin there, and yield only after so long that one of them must have lost its core.
struct Member {
    int index, count;
    std::atomic<int64_t>* met;

    void wait() {
        if (count == 1) return;
        const int64_t round = (met->fetch_add(1) / count + 1) * count;
        for (int spins = 0; met->load(std::memory_order_acquire) < round; spins++) {
            if (spins > 4000) std::this_thread::yield();
            pause();
        }
    }
    Range part(int64_t n) const { return share(n, GROUP, index, count); }
};

template <class F> void team(int threads, const F& work) {
    std::atomic<int64_t> met{0};
    on_threads(threads, [&](int index, int count) { work(Member{index, count, &met}); });
}

// All buffers of a step, carved out of one block that the calling thread keeps for the next step.
struct Arena {
    char* block;
    size_t used = 0, size;

    template <class T> T* take(int64_t n) {
        T* taken = (T*)(block + used);
        used += round_up(n * sizeof(T), 64);
        return taken;
    }
    float* floats(int64_t rows, int64_t width) { return take<float>(rows * Rows::padded(width)); }
    Rows rows(int64_t count, int64_t width) {
        const int64_t stride = Rows::padded(width), n = count * stride;
        const Rows made{take<float>(n), count, width, stride, take<Half>(n), take<int16_t>(n), take<float>(n / GROUP),
                        take<int32_t>(n / GROUP)};
        for (int64_t m = 0; block && width < stride && m < count; m++) {  // kernels read the padding: it must be zero
            memset(made.row(m) + width, 0, (stride - width) * 4);
            memset(made.half + m * stride + width, 0, (stride - width) * sizeof(Half));
        }
        return made;
    }
};

constexpr std::align_val_t ALIGNED{64};

// Runs `work` twice: first with a null block, to measure how much memory it takes (it must do nothing else then), and
// again with a block of that size, which is null too if it cannot be allocated.
template <class F> void with_memory(const F& work) {
    struct Free {
        void operator()(char* block) const { ::operator delete(block, ALIGNED); }
    };
    static thread_local std::unique_ptr<char, Free> kept;
    static thread_local size_t size = 0;
    Arena counting{nullptr};
    work(counting);
    if (counting.used > size) {
        kept.reset();
        kept.reset((char*)::operator new(counting.used, ALIGNED, std::nothrow));
        size = kept ? counting.used : 0;
    }
    Arena memory{kept.get()};
    work(memory);
}
