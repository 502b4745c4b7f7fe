// RWKV World's tokenizer: at every position it takes the longest token that matches the following bytes.
//
// The tokens form a trie in a double array: the child of node n by a byte is in slot base(n) + byte, if that slot names
// n as its parent. A node is identified by the index of its slot, the root is 0. Python owns the array.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "platform.h"

namespace {

// a slot in 64 bits: parent << 40 | base << 16 | token; base is 0 in a node without children, token 0 where none ends
uint32_t parent_of(uint64_t slot) { return uint32_t(slot >> 40); }
uint32_t base_of(uint64_t slot) { return uint32_t(slot >> 16) & 0xFFFFFF; }
uint32_t token_of(uint64_t slot) { return uint32_t(slot & 0xFFFF); }

struct Node {
    uint32_t parent;
    uint8_t byte;  // from the parent to here
    uint32_t token, children;
    uint32_t slot, base;
};

// The nodes of the trie, each after its parent; a hash table finds the child of a node by a byte.
class Trie {
  public:
    Trie() : nodes(1), table(1 << 18) { nodes.reserve(1 << 17); }

    uint32_t child(uint32_t parent, uint8_t byte) {
        const uint32_t edge = parent << 8 | byte;
        uint32_t at = (edge * 0x9E3779B1u) >> 14;  // 18 bits
        for (; table[at].node; at = (at + 1) & (uint32_t(table.size()) - 1))
            if (table[at].edge == edge) return table[at].node;
        table[at] = {edge, uint32_t(nodes.size())};
        nodes.push_back({parent, byte, 0, 0, 0, 0});
        ++nodes[parent].children;
        return table[at].node;
    }

    std::vector<Node> nodes;

  private:
    struct Entry {
        uint32_t edge, node;
    };
    std::vector<Entry> table;
};

// Gives every node a slot below `slots`; false if they do not fit. Nodes with many children are placed first, into the
// empty array, those with one child fill the gaps.
bool place(std::vector<Node>& nodes, uint32_t slots) {
    std::vector<uint32_t> first(nodes.size() + 1), children(nodes.size()), parents[257];
    for (uint32_t n = 0; n < nodes.size(); ++n) {
        first[n + 1] = first[n] + nodes[n].children;
        parents[nodes[n].children].push_back(n);
    }
    std::vector<uint8_t> bytes(nodes.size());  // of the children
    std::vector<uint32_t> end(first.begin(), first.end() - 1);
    for (uint32_t n = 1; n < nodes.size(); ++n) {
        const uint32_t i = end[nodes[n].parent]++;
        children[i] = n;
        bytes[i] = nodes[n].byte;
    }

    std::vector<uint8_t> used(slots);
    used[0] = true;       // the root's
    uint32_t lowest = 1;  // slot that may be free
    for (uint32_t count = 256; count > 0; --count) {
        while (used[lowest]) ++lowest;
        uint32_t slot = lowest;  // only moves forward: gaps that were passed are left to nodes with fewer children
        for (const uint32_t parent : parents[count]) {
            const uint8_t* byte = &bytes[first[parent]];
            const auto fits = [&](uint32_t base) {
                return std::none_of(byte, byte + count, [&](uint8_t b) { return used[base + b]; });
            };
            while (slot <= byte[0] || (slot + 256 < slots && !fits(slot - byte[0]))) ++slot;
            if (slot + 256 >= slots) return false;
            const uint32_t base = nodes[parent].base = slot - byte[0];
            for (uint32_t i = 0; i < count; ++i) {
                nodes[children[first[parent] + i]].slot = base + byte[i];
                used[base + byte[i]] = true;
            }
        }
    }
    return true;
}

}  // namespace

// Fills `array` [slots], all zeros, with the tokens 1 .. count, given as their concatenated bytes and the length of
// each. Returns 1, 0 if `slots` is too small, or -1 if out of memory.
EXPORT int world_build(uint64_t* array, int64_t slots, const uint8_t* bytes, const uint8_t* lengths, int64_t count) {
    try {
        Trie trie;
        const uint8_t* previous = bytes;  // most tokens share a prefix with the previous one
        uint32_t path[256] = {};         // the nodes of that one; the root first
        int known = 0;                   // how many of these nodes are valid, not counting the root
        for (int64_t token = 1; token <= count; ++token) {
            const int length = lengths[token - 1];
            known = int(std::mismatch(bytes, bytes + std::min(known, length), previous).first - bytes);
            for (; known < length; ++known) path[known + 1] = trie.child(path[known], bytes[known]);
            trie.nodes[path[length]].token = uint32_t(token);
            previous = bytes;
            bytes += length;
        }
        if (!place(trie.nodes, uint32_t(slots))) return 0;
        for (const Node& node : trie.nodes)
            array[node.slot] = uint64_t(trie.nodes[node.parent].slot) << 40 | uint64_t(node.base) << 16 | node.token;
        return 1;
    } catch (...) {
        return -1;
    }
}

// Encodes text [size] from `*position` on, until its end or until `ids` [capacity] is full. Returns the number of ids
// and advances `*position` past the bytes that they stand for. Every single byte is a token, so one always fits.
EXPORT int64_t world_encode(const uint64_t* array, const uint8_t* text, int64_t size, int64_t* position, uint16_t* ids,
                            int64_t capacity) {
    const uint32_t root = base_of(array[0]);
    int64_t begin = *position, count = 0;
    while (begin < size && count < capacity) {
        int64_t end = begin + 1;
        uint32_t node = root + text[begin];
        uint64_t slot = array[node];
        uint32_t token = token_of(slot);
        for (int64_t i = begin + 1; i < size && base_of(slot); ++i) {
            const uint32_t child = base_of(slot) + text[i];
            slot = array[child];
            if (parent_of(slot) != node) break;
            node = child;
            if (token_of(slot)) {
                token = token_of(slot);
                end = i + 1;
            }
        }
        ids[count++] = uint16_t(token);
        begin = end;
    }
    *position = begin;
    return count;
}
