// Calls one function of a library on memory read from standard input, then writes that memory to standard output.
//
// Usage: call LIBRARY FUNCTION. Standard input holds 64-bit integers: the number of blocks and the size of each; the
// number of pointers and for each the block and offset where it is stored and the block and offset it points to; 10
// arguments, each as a block and an offset, or as -1 and a number. The contents of the blocks follow.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>

static void check(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "call: %s\n", what);
    exit(1);
}

static int64_t number() {
    int64_t x;
    check(fread(&x, sizeof x, 1, stdin) == 1, "input ends early");
    return x;
}

int main(int count, char** arguments) {
    check(count == 3, "expected a library and a function");
    void* library = dlopen(arguments[1], RTLD_NOW);
    check(library, "cannot load the library");
    typedef int64_t N;
    auto function = (void (*)(N, N, N, N, N, N, N, N, N, N))dlsym(library, arguments[2]);
    check(function, "the library has no such function");

    struct Block {
        char* at;
        size_t size;
    } blocks[1000];
    const int64_t block_count = number();
    check(block_count <= 1000, "too many blocks");
    for (int64_t i = 0; i < block_count; i++) {
        blocks[i].size = number();
        blocks[i].at = (char*)aligned_alloc(64, (blocks[i].size + 127) / 64 * 64);
    }
    struct Pointer {
        int64_t block, offset, to_block, to_offset;
    };
    const int64_t pointer_count = number();
    Pointer* pointers = (Pointer*)calloc(pointer_count + 1, sizeof(Pointer));
    for (int64_t i = 0; i < pointer_count; i++) pointers[i] = {number(), number(), number(), number()};
    int64_t values[10];
    for (int64_t& value : values) {
        const int64_t block = number(), offset = number();
        value = block < 0 ? offset : (int64_t)(blocks[block].at + offset);
    }
    for (int64_t i = 0; i < block_count; i++)
        check(fread(blocks[i].at, 1, blocks[i].size, stdin) == blocks[i].size, "input ends early");
    for (int64_t i = 0; i < pointer_count; i++)
        *(char**)(blocks[pointers[i].block].at + pointers[i].offset) = blocks[pointers[i].to_block].at + pointers[i].to_offset;

    const int64_t* v = values;
    function(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9]);
    for (int64_t i = 0; i < block_count; i++) fwrite(blocks[i].at, 1, blocks[i].size, stdout);
}
