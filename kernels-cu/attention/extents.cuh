// Which tokens a batch entry has, and which keys a query of it sees: always the first ones, up to a limit.
#pragma once

#include "common.cuh"

// The tokens of an entry: its first query among the tensor's tokens and the number of them, the same of the keys that may be seen, and
// where the limits of its queries start.
struct Entry {
    int query, queries, key, keys, limits;
};

// entries: by (batch0, batch1), or null where all are `alike`. limits: keys that a query sees, never fewer than those of the one before
// it; null: all of its entry. ragged: entries of the first batch axis that lie one behind the other; 0: that axis has a stride.
struct Extents {
    const Entry* entries;
    const int* limits;
    Entry alike;
    int ragged;

    __device__ __forceinline__ Entry entry(int i) const { return entries ? entries[i] : alike; }
    __device__ __forceinline__ int limit(const Entry& e, int query) const { return limits ? limits[e.limits + query] : e.keys; }
    // The number of the entry of the token of a ragged tensor. `keys`: it counts keys, not queries.
    __device__ int place(int token, int b1, int size1, bool keys) const {
        // The last entry that does not start behind the token: those before it at the same place are empty.
        int low = 0, high = ragged;
        while (high - low > 1) {
            int middle = (low + high) / 2, start = keys ? entries[middle * size1].key : entries[middle * size1].query;
            if (start <= token)
                low = middle;
            else
                high = middle;
        }
        return low * size1 + b1;
    }
    __device__ Entry find(int token, int b1, int size1, bool keys) const { return entries[place(token, b1, size1, keys)]; }
};
