// Attention of sequences with one query token on Hopper: a tile of keys or values lies in memory as ldmatrix wants it, so
// that it is one bulk copy, which takes no register, no issue slot of 32 lanes and no way through L1.
#include "common/attention_decode.cuh"

template <class Cache_, int D>
struct BulkCopies {
  using Cache = Cache_;
  static constexpr int kRowBytes = Cache::kBytes * D;
  /// With the soft-cap; a running maximum takes too many registers.
  static constexpr int kMinBlocks = 2;
  static constexpr bool kLoadsEarly = true;
  static DEVICE void init(uint32_t barriers, int count) {
    for (int i = 0; i < count; i++) mbarrier_init(barriers + uint32_t(8 * i), 1);
    fence_mbarrier_init();
  }
  static DEVICE void load_keys(Stage to, const uint8_t* kv, unsigned tile, TileRows rows, const bf16* queries,
                               int group, int lane) {
    if (lane != 0) return;
    expect_keys(to, kv, tile, rows, queries != nullptr, group);
    if (queries != nullptr) load_queries(to, queries, group);
  }
  static DEVICE void load_keys_before_queries(Stage to, const uint8_t* kv, unsigned tile, TileRows rows,
                                              bool has_queries, int group, int lane) {
    if (lane == 0) expect_keys(to, kv, tile, rows, has_queries, group);
  }
  /// One lane.
  static DEVICE void load_queries(Stage to, const bf16* queries, int group) {
    bulk_copy(to.keys + 2 * kTileBytes, queries, uint32_t(group * 2 * D), to.barrier);
  }
  static DEVICE void load_values(Stage to, const uint8_t* kv, unsigned tile, TileRows rows, int lane) {
    if (lane != 0) return;
    mbarrier_arrive_expect_tx(to.barrier + 8, bytes_of(rows));
    load_rows(to.keys + kTileBytes, kv, tile, rows, to.barrier + 8);
  }
  static DEVICE void commit() {}
  /// The place's load of keys or values.
  static DEVICE void wait(Stage to, uint32_t parity, int is_value, int) {
    mbarrier_wait(to.barrier + uint32_t(8 * is_value), parity);
  }
  /// Zeros for values that are not the unit's: their probabilities are zero, what lies there may be no number.
  static DEVICE void clear_values(Stage to, TileRows rows, int lane) {
    if (rows.end - rows.first == kTile) return;
    constexpr int kChunks = kRowBytes / 16;
    for (int i = lane; i < kTile * kChunks; i += 32) {
      const int row = i / kChunks;
      if (row < rows.first || row >= rows.end) store_zeros_16(to.keys + kTileBytes + uint32_t(16 * i));
    }
    // A later bulk copy writes there.
    fence_proxy_async();
  }
  static DEVICE void finish() {}

 private:
  static constexpr uint32_t kTileBytes = DecodeShared<Cache, D>::kTileBytes;
  /// One lane. The place is full when the queries have come, too.
  static DEVICE void expect_keys(Stage to, const uint8_t* kv, unsigned tile, TileRows rows, bool has_queries, int group) {
    mbarrier_arrive_expect_tx(to.barrier, bytes_of(rows) + (has_queries ? uint32_t(group * 2 * D) : 0));
    load_rows(to.keys, kv, tile, rows, to.barrier);
  }
  static DEVICE uint32_t bytes_of(TileRows rows) { return uint32_t((rows.end - rows.first) * kRowBytes); }
  static DEVICE void load_rows(uint32_t to, const uint8_t* kv, unsigned tile, TileRows rows, uint32_t barrier) {
    const uint8_t* from = kv + size_t(tile) * kTileBytes + rows.first * kRowBytes;
    bulk_copy(to + uint32_t(rows.first * kRowBytes), from, bytes_of(rows), barrier);
  }
};

ATTENTION_DECODE(attention_decode_bulk, BulkCopies, Bf16Cache)
ATTENTION_DECODE(attention_decode_bulk_e4m3, BulkCopies, E4m3Cache)
