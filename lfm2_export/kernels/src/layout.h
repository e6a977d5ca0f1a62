// The packed weight layout, shared by every kernel. lfm2_export/kernels/packing.py writes it; keep the two together.
//
// A matrix [rows, k] (both multiples of 32) is stored as [rows/32][k/32] tiles of 576 bytes, a tile being 32 rows by
// one group of 32 inputs:
//
//   bytes   0 ..  63   32 float16 scales, one per row (negative ones are allowed)
//   bytes  64 .. 575   codes, [quad 0..3][row 0..31][byte 0..3]: the low nibble holds input 4*quad + byte,
//                      the high nibble input 16 + 4*quad + byte;  weight = (code - 8) * scale
//
// Four neighbouring inputs of one row fill 32 bits, so 16, 32 or 64 bytes are 4, 8 or 16 rows in the shape that sdot
// (NEON) and vpdpbusd / vpmaddubsw (AVX) take, with no shuffles: one AND and one shift unpack them. A tile is nine
// cache lines, and the tiles of a row block are read front to back.
//
// The expert's gate (w1) and up (w3) matrices share a tensor, row blocks alternating: gate 0..31, up 0..31,
// gate 32..63...

#pragma once

#include <cstdint>

namespace lfm2 {

constexpr int kGroup = 32;     // inputs that share a scale, in weights and activations
constexpr int kTileRows = 32;  // output rows of a tile
constexpr int kQuads = 4;      // vectors of codes per row of a tile; each holds two quads of inputs
constexpr int kCodesOffset = kTileRows * 2;
constexpr int kTileBytes = kCodesOffset + kTileRows * kGroup / 2;
constexpr int kZeroPoint = 8;

static_assert(kTileBytes == 576);

}  // namespace lfm2
