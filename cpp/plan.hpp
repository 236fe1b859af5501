// How the work of a problem is cut into pieces. The cuts depend on shapes and strides alone, never on the number of
// threads: whoever computes a piece, its sums are the same and are added up in the same order, so results have the
// same bits for any number of threads.
#pragma once

#include <cstdint>

#include "problem.hpp"

namespace batchnorm {

// Rows: the elements of a channel are contiguous along s; a row is one (n, c). Coefficients are constants of a row.
//
// Columns: channels are contiguous; a row is one (n, s) and holds a column for each channel. Rows shorter than a
// vector are put side by side (`width` is then several times C), and rows of channel-first data with few s are taken
// as they lie in memory, C * S columns of which S belong to a channel. Column j belongs to channel (j / inner) % C.
struct Plan {
  bool is_columns;
  int64_t width;    // columns: elements of a row; rows: C
  int64_t pitch;    // width rounded up, so that whole vectors can be read from tables of that length
  int64_t inner;    // columns of a channel that follow each other
  int64_t rows;     // columns: number of rows, of which the last may be shorter
  int64_t elements; // columns: N * C * S
  bool is_flat;     // columns: row r starts at element r * width, in every tensor

  // Rows: chunk k covers n in [k * chunk_n, ...) and all s, or a part of the s of one n where S is large.
  // Columns: chunk_n rows and at most chunk_s columns.
  int64_t chunk_n, chunk_s, chunks, chunks_per_row;

  int64_t channel_of(int64_t column, int64_t C) const { return column / inner % C; }

  bool is_streaming;    // stores go past the cache: what is written would push out what is still to be read
  int64_t cache_bytes;  // of one core, that a thread may count on between two passes

  // Bytes that the kernels need besides their arguments.
  int64_t workspace;
};

// False where the tensors' strides fit neither family.
bool make_plan(const Problem& problem, Plan& plan);

}  // namespace batchnorm
