// Partition of the work of a problem. The partition of the sums depends on shapes and strides alone, never on the
// number of threads. Each chunk has the same sums on any thread, and they are added up in the same order, so results
// have the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "problem.hpp"

namespace batchnorm {

// Rows: the elements of a channel are contiguous along s; a row is one (n, c).
//
// Columns: a row has one or more columns for each channel; sums and coefficients go by column. Channels last, a row is
// one (n, s) and has one column for each channel; rows shorter than a few vectors are put side by side. Channels first
// with few s (short rows), a row is one n and has S columns for each channel.
enum class Family : uint8_t { rows, columns, short_rows };

struct Plan {
  Family family;

  // Columns and short rows only.
  int64_t width;        // columns of a row
  int64_t rows;         // in a flat plan the last one may be shorter
  int64_t elements;     // N * C * S
  bool has_row_groups;  // several rows are traversed together
  bool is_flat;         // rows are put side by side: row r starts at element r * width of every tensor

  // A chunk covers chunk_n values of n (in the columns family rows) and, in the rows family, chunk_s values of s. It is
  // cut into blocks of `block` channels or columns. If S is large, chunks_per_row chunks share one n.
  int64_t chunk_n, chunk_s, chunks, chunks_per_row, block;

  bool is_streaming;          // results are stored past the cache, where they would evict data still to be read
  int64_t channels_per_task;  // channels that a thread takes at a time; 0: all threads share all channels

  int64_t table_length;     // of a table of coefficients by column
  int64_t workspace_bytes;  // memory that the kernels need besides their arguments
};

constexpr int64_t row_block = 32;  // channels of a tile of rows, whose sums are on the stack

// Maximal columns of a tile of columns, whose sums are on the stack. Fixed forever: it determines the order of sums
// (see plan.cpp).
constexpr int64_t max_block = 2048;

// The workspace has arrays that each begin at a cache line, and tables of coefficients.
constexpr int64_t cache_line_bytes = 64;
constexpr int64_t coefficient_tables = 7;  // members of `Tables`
constexpr int64_t table_slack = 32;  // elements after a table, because whole vectors of any instruction set are read

// Returns false if no family fits the strides of the tensors.
bool make_plan(const Problem& problem, Plan& plan);

}  // namespace batchnorm
