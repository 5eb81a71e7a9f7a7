// Which tokens a batch entry has and which keys a query sees: `ops/attention/extents.rs` on the device.
#pragma once

#include <stdint.h>

// Tokens [query, query + queries) of the queries' tensor and keys [key, key + keys) of the keys'; its limits start at `limits`.
struct Entry {
    int query, queries, key, keys, limits;
};

// As the launcher passes it (no padding). entries: by (batch0, batch1), or null where all are `alike`; limits: keys that a query sees,
// never fewer than those of the one before it, or null where it sees all keys of its entry.
struct Extents {
    const Entry* entries;
    const int* limits;
    Entry alike;
    int batch1;
};

__device__ __forceinline__ Entry entry(const Extents& extents, int i) { return extents.entries ? extents.entries[i] : extents.alike; }

// Keys that a query sees; queries behind the last see what that does.
__device__ __forceinline__ int limit(const Extents& extents, const Entry& entry, int query) {
    return extents.limits && entry.queries > 0 ? extents.limits[entry.limits + min(query, entry.queries - 1)] : entry.keys;
}
