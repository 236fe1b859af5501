// A pool of buffers for large results.
//
// Large memory from the C library is usually new from the system, which provides it page by page, at a page fault each.
// That takes longer than a batch norm. So freed buffers are cached for the next result of about their size, and the
// buffer that was freed last, which may still be in the CPU's cache, is used first.
#pragma once

#include <cstdint>

namespace batchnorm {

constexpr int64_t min_pooled_bytes = 1 << 18;    // bytes; for smaller results the C library is fast
constexpr int64_t max_cached_bytes = 512 << 20;  // of all cached buffers; beyond, the oldest are unmapped
constexpr int64_t max_idle_seconds = 10;         // age at which a cached buffer is unmapped, when another one is freed

// Allocates at least this many bytes, aligned to 64, with undefined contents. Throws std::bad_alloc.
void* allocate_pooled(int64_t bytes);

// Any thread may free a buffer of any other. `bytes` are those of its allocation.
void deallocate_pooled(void* buffer, int64_t bytes);

// Bytes of the buffers in the cache.
int64_t cached_bytes();

// Unmaps all cached buffers.
void release_cached();

}  // namespace batchnorm
