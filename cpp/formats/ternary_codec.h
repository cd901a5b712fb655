// SPDX-License-Identifier: Apache-2.0
// Ternary matrices in the layouts of other engines' files: what a codec is, and whole matrices
// decoded and encoded with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/parallel.h"
#include "formats/layout.h"
#include "formats/packed_tensor.h"
#include "formats/ternary.h"

namespace tf {

// A codec of one layout whose bytes hold codes and scales. Codes are trit + 1: 0, 1, 2; a decoder
// writes kNoTrit for a weight that is none. Numbers in files are little-endian.
struct TernaryCodec {
  Layout layout;
  ScaleKind scale_kind;      // kTensor, kRow, or kGroup: one per block
  size_t block_cols;         // columns of a block; with kGroup those that share a scale
  bool half_scales;          // scales are stored as f16, else as f32
  bool binary;               // no weight is 0
  std::string_view no_trit;  // why a weight may be no trit, for the error

  // Throws std::invalid_argument where the layout cannot hold the shape.
  size_t (*bytes)(size_t rows, size_t cols);
  // One row: codes [cols], scales [ScalesPerRow]. Shape and size of the data were checked before.
  void (*decode_row)(const uint8_t* data, size_t rows, size_t cols, size_t row, uint8_t* codes,
                     float* scales);
  // The inverse, for codes that are trits (-1 and +1 only where `binary`). Rows may be written from
  // several threads; bytes that belong to no row are written with row 0. Null where the layout is
  // only read.
  void (*encode_row)(const uint8_t* codes, const float* scales, size_t rows, size_t cols,
                     size_t row, uint8_t* data);

  size_t ScalesPerRow(size_t cols) const {
    return scale_kind == ScaleKind::kGroup ? cols / block_cols : 1;
  }
};

inline constexpr uint8_t kNoTrit = 3;

// The codec of a layout; null for layouts that are not ternary or keep their scales elsewhere.
const TernaryCodec* FindTernaryCodec(Layout layout);

// Decodes one row and brings it to the one form that scales have here: a negative scale becomes
// positive with its trits negated, and where the scale is 0 the trits are. Returns false when a
// code is kNoTrit or a scale is not finite.
bool DecodeTernaryRow(const TernaryCodec& codec, std::span<const uint8_t> data, size_t rows,
                      size_t cols, size_t row, uint8_t* codes, float* scales);

// Throws the FormatError that says what is wrong in a row for which DecodeTernaryRow was false.
[[noreturn]] void ThrowUndecodable(const TernaryCodec& codec, std::span<const uint8_t> data,
                                   size_t rows, size_t cols, size_t row);

// A whole matrix: trits [rows, cols]; scales [rows, ScalesPerRow(cols)], with kTensor [1].
// Throws std::invalid_argument when sizes do not fit, FormatError when the data is not ternary.
void DecodeTernary(const TernaryCodec& codec, std::span<const uint8_t> data, size_t rows,
                   size_t cols, const Team& team, std::span<int8_t> trits, std::span<float> scales);

// The inverse. `scales` are any kind; weight = trit * effective. Exact or refused: throws
// std::invalid_argument that names the place when a value is no trit, when the layout cannot hold
// the shape, when weights with different scales would have to share one, or when a scale is not
// exact in f16 where the layout stores f16. A weight whose scale is 0 becomes trit 0.
void EncodeTernary(const TernaryCodec& codec, std::span<const int8_t> trits, size_t rows,
                   size_t cols, const Scales& scales, const Team& team, std::span<uint8_t> data);

// Block scales [rows, per_row] as the coarsest kind that is exact: tensor, row, else groups of
// block_cols times a power of two. A scale of 0 stands for trits that are all 0 and fits any other.
// `group_size` of the result may be smaller than kChunkCols.
struct CollapsedScales {
  ScaleKind kind;
  size_t group_size;
  std::vector<float> values;  // [1], [rows] or [rows, groups]
};
CollapsedScales CollapseScales(std::span<const float> block_scales, size_t rows, size_t cols,
                               size_t block_cols);

// The codecs, one file each.
extern const TernaryCodec kI2SCodec, kI2S64Codec, kI2SRows4Codec;  // i2_s.cc
extern const TernaryCodec kTq10Codec;                              // tq1_0.cc
extern const TernaryCodec kTq20Codec;                              // tq2_0.cc
extern const TernaryCodec kQ10Codec;                               // q1_0.cc
extern const TernaryCodec kQ20Codec;                               // q2_0.cc
extern const TernaryCodec kPq20Codec;                              // pq2_0.cc
extern const TernaryCodec kPtq10Codec;                             // ptq1_0.cc
extern const TernaryCodec kQ2KCodec;                               // q2_k.cc
extern const TernaryCodec kQ40Codec;                               // q4_0.cc
extern const TernaryCodec kIq1BnCodec;                             // iq1_bn.cc
extern const TernaryCodec kIq2BnCodec;                             // iq2_bn.cc

}  // namespace tf
