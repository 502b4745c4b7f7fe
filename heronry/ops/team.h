// A team of threads that runs one computation together, and its working memory.
#pragma once

#include <atomic>
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
    on_threads(threads, [&](int index, int count) noexcept { work(Member{index, count, &met}); });  // others would wait
}

// All buffers of a step, carved out of one block that Python lends for the call, aligned to 64 bytes.
struct Arena {
    char* block;
    size_t used = 0;

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

// Runs `work` with the memory at `block`. Without a block it must do nothing but take what it needs: that many bytes are
// then written to `size`.
template <class F> void with_memory(char* block, int64_t* size, const F& work) {
    Arena memory{block};
    work(memory);
    *size = int64_t(memory.used);
}
