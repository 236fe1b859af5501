// Sizes of the machine's data caches. Limits that determine only the speed are derived from them.
#pragma once

#include <cstdint>

namespace batchnorm {

// Bytes of the second and the third level, as one core sees them: all of a level that several cores share.
struct Caches { int64_t l2, l3; };

// The caches of the first core, as the operating system or the processor reports them, or those of `set_caches`.
Caches caches();

// Replaces the sizes that are not 0.
void set_caches(Caches sizes);

}  // namespace batchnorm
