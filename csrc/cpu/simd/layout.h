// SPDX-License-Identifier: Apache-2.0
//
// How points lie in memory.
//
// Points are stored in tiles of 64, coordinate by coordinate: coordinate k of
// point i is tiles[(i / 64 * depth + k) * 64 + i % 64], so that a register
// holds one coordinate of many points. The last tile is filled up with zeros.
//
// Columns (directions to project on, centres) are packed by `pack_columns` in
// groups of 6: group g is [depth][6] (the last one as wide as is left), which
// with 64 points fills the registers of AVX-512.
#pragma once

#include <cstdint>

namespace kdci {

constexpr int64_t tile_points = 64;
constexpr int64_t group_columns = 6;

} // namespace kdci
