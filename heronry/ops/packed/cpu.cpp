// y = W x for weights of 8 or 4 bits.

#include "team.h"

// block, size: as for with_memory
EXPORT int packed_matmul(const Tensor* w, const void* x, int64_t dtype, float* y, int64_t rows, int64_t threads,
                         char* block, int64_t* size) {
    const int64_t in = w->columns, out = w->rows;
    with_memory(block, size, [&](Arena& memory) {
        const Rows all = memory.rows(rows, in);
        if (!memory.block) return;
        team(int(threads), [&](Member me) {
            for (int64_t m = me.index; m < rows; m += me.count) {
                read(all.row(m), (const char*)x + m * in * bytes(dtype), dtype, int(in));
                all.pack(*w, m, 0, in);
            }
            me.wait();
            matmul(*w, all, y, out, me.part(out));
        });
    });
    return 0;
}
