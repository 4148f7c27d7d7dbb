// Where operands of matrix products lie in memory, and how wgmma is told so.
#pragma once

#include "ptx.cuh"

/// A panel holds 128 bytes of K (128 e4m3 or 64 bf16 values) of every row of a matrix, rows one after another:
/// `[K panels][rows][128 bytes]`. The 16-byte chunks of a row are permuted by the row's lowest bits, which is the 128-byte
/// swizzle of shared memory: a run of rows that starts at a multiple of 8 is copied as it is and read by wgmma or
/// ldmatrix without bank conflicts. Weights and activations lie so in global memory.
constexpr int kPanelBytes = 128;

/// Byte offset of byte `k_byte` of row `row`, with `rows` rows to a panel.
DEVICE size_t panel_offset(int row, int k_byte, int rows) {
  const size_t line = size_t(k_byte / kPanelBytes) * size_t(rows) + size_t(row);
  const int chunk = (k_byte % kPanelBytes / 16) ^ (row & 7);
  return line * kPanelBytes + size_t(chunk * 16 + k_byte % 16);
}

/// Descriptor of a K-major operand in shared memory: rows of 128 bytes, 128-byte swizzle, 8-row groups 1024 bytes apart.
/// `address` is aligned to 1024 plus 32 for each step along K.
DEVICE uint64_t operand_descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}

/// Descriptor of a transposed operand, rows of which run along K: panels of 64 bf16 of each row as above, `panel_bytes`
/// apart. `address` is aligned to 1024.
DEVICE uint64_t transposed_operand_descriptor(uint32_t address, uint32_t panel_bytes) {
  return uint64_t((address & 0x3FFFF) >> 4) | (uint64_t(panel_bytes >> 4) << 16) | (uint64_t(1024 >> 4) << 32) |
         (uint64_t(1) << 62);
}

/// Added to a descriptor for the next 32 bytes along K.
constexpr uint64_t kDescriptorStep = 2;

/// The tensor core keeps sums of e4m3 products with about 14 bits below the largest: after this many panels of K, counted
/// from k = 0, they are added to f32. Every e4m3 GEMM has the same interval, so that all of them give the same bits.
constexpr int kPromoteEvery = 4;
