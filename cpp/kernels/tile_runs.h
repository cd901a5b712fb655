// SPDX-License-Identifier: Apache-2.0
// Where the columns of each scale group lie in a panel of run-time tiles: shared by the ternary
// kernels.
#pragma once

#include <algorithm>
#include <cstddef>

#include "formats/packed_tensor.h"
#include "formats/t16.h"
#include "formats/t20.h"

namespace tf {

// Neighbouring tiles whose columns are neighbours: all planes of T16 tiles, or one plane of T20
// tiles (four columns a tile).
struct TileRun {
  size_t byte;  // of the first tile in the panel
  size_t tiles;
  size_t plane;  // kAllPlanes for T16
  size_t col;    // the first column

  static constexpr size_t kAllPlanes = kT20Planes;
  size_t TileCols() const { return plane == kAllPlanes ? kT16TileCols : 4; }
};

// Tensor and row scales count as one group that spans all columns.
class TileRuns {
 public:
  explicit TileRuns(const PackedTensor& weight)
      : is_t20_(weight.layout() == Layout::kT20),
        cols_(weight.cols()),
        group_size_(weight.scales().group_size),
        shape_(cols_, group_size_),
        groups_(weight.scales().PerRow(cols_)) {}

  const T20Shape& shape() const { return shape_; }  // of T20
  size_t groups() const { return groups_; }
  // Groups whose columns are planes of T20 tiles: whole segments of five.
  size_t PlaneGroups() const {
    return is_t20_ && group_size_ != 0 ? shape_.segments * kT20Planes : 0;
  }
  size_t PanelBytes() const { return is_t20_ ? shape_.PanelBytes() : T16PanelBytes(cols_); }

  size_t RunsPerGroup() const { return is_t20_ && group_size_ == 0 ? kT20Planes : 1; }

  // Run `index` of a group; runs follow each other in the order of their columns.
  TileRun Run(size_t group, size_t index) const {
    const size_t col = group * group_size_;
    if (is_t20_ && group_size_ == 0) {
      return {0, shape_.SegmentTiles(), index, index * shape_.plane_cols};
    }
    if (group < PlaneGroups()) {
      const size_t tile = group / kT20Planes * shape_.SegmentTiles();
      return {tile * kTileBytes, shape_.SegmentTiles(), group % kT20Planes, col};
    }
    const size_t begin = is_t20_ ? shape_.tail_begin : 0;  // the first column in T16 tiles
    const size_t end = group_size_ == 0 ? cols_ : std::min(col + group_size_, cols_);
    const size_t byte =
        (is_t20_ ? shape_.TailBegin() : 0) + (col - begin) / kT16TileCols * kTileBytes;
    return {byte, T16TilesPerPanel(end - col), TileRun::kAllPlanes, col};
  }

 private:
  bool is_t20_;
  size_t cols_;
  size_t group_size_;
  T20Shape shape_;
  size_t groups_;
};

}  // namespace tf
