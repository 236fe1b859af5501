// How the work of a problem is cut into pieces. The cuts of the sums depend on shapes and strides alone, never on the
// number of threads: whoever computes a piece, its sums are the same and are added up in the same order, so results have
// the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "problem.hpp"

namespace batchnorm {

// Rows: the elements of a channel are contiguous along s; a row is one (n, c).
//
// Columns: a row holds a column or several for each channel; sums and coefficients go by column. Channels last, a row is
// one (n, s) and has a column for each channel; rows that are shorter than some vectors are put side by side. Channels
// first with few s, a row is one n and has S columns for each channel.
enum class Family : uint8_t { rows, columns, short_rows };

struct Plan {
  Family family;

  // Columns and short rows.
  int64_t width;        // columns of a row
  int64_t rows;         // of which, in a flat plan, the last may be shorter
  int64_t elements;     // N * C * S
  bool has_row_groups;  // several rows are walked at a time
  bool is_flat;         // row r starts at element r * width of every tensor: rows are put side by side

  // Chunk k covers n (rows: and s; columns: rows) from k * chunk_n on, in blocks of `block` channels or columns. Where S
  // is large a chunk is a part of the s of one n.
  int64_t chunk_n, chunk_s, chunks, chunks_per_row, block;

  bool is_streaming;          // stores go past the cache: what is written would push out what is still to be read
  int64_t channels_per_task;  // channels that a thread takes at a time, if channels can be told apart; else 0

  int64_t table_length;     // of a table by column
  int64_t workspace_bytes;  // bytes that the kernels need besides their arguments
};

constexpr int64_t row_block = 32;  // channels of a tile of rows: their sums are on the stack

// Columns of a tile of columns, whose sums are on the stack. It decides the order of sums (see plan.cpp), for ever.
constexpr int64_t max_block = 2048;

// The workspace: arrays that each begin a cache line, and tables of coefficients.
constexpr int64_t cache_line_bytes = 64;
constexpr int64_t coefficient_tables = 7;  // as in `Tables`
constexpr int64_t table_slack = 32;        // elements behind a table: whole vectors of any instruction set are read

// False where the tensors' strides fit no family.
bool make_plan(const Problem& problem, Plan& plan);

}  // namespace batchnorm
