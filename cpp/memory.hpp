// Memory for large results, kept when it is given back.
//
// A large block from the C library is fresh from the system more often than not, which provides it page by page as it is
// written: that takes longer than a batch norm does. So blocks that come back wait for the next result of about their
// size, the one that came back last (and may still be in the cache) going first.
#pragma once

#include <cstdint>

namespace batchnorm {

constexpr int64_t min_pooled_bytes = 1 << 18;    // bytes; below, the C library does well
constexpr int64_t max_cached_bytes = 512 << 20;  // bytes that wait in all; beyond, the system gets the oldest back
constexpr int64_t max_idle_seconds = 10;         // seconds, after which it gets them back too, at the next occasion

// At least so many bytes, aligned to 64, with undefined contents. Throws std::bad_alloc.
void* allocate_pooled(int64_t bytes);

// Any thread may give back what any other has taken.
void deallocate_pooled(void* buffer, int64_t bytes);

// Bytes that wait now.
int64_t cached_bytes();

// The system gets all of them back.
void release_cached();

}  // namespace batchnorm
