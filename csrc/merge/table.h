// What one launch of the merge and gram kernels is told: tensors, terms and chunks, by value.
#pragma once

#include <algorithm>
#include <vector>

#include "../cuda/multi_tensor.h"
#include "kernel.h"

namespace tangentfast {

constexpr size_t kTableBytes = kParameterBytes - 64;  // a few other arguments beside the table
constexpr int64_t kMergeChunk = 16384;
constexpr int64_t kGramPart = 65536;  // fixed, so that the sums have one order

struct MergeEntry {
  void* base;
  int64_t numel, first_chunk;
  int32_t first_term, count;
  Type type;
  int16_t width, head;  // elements of an access, and the first that may be read so
};

struct MergeTable {
  static constexpr int kEntries = 180, kTerms = 1480;
  int64_t chunks;
  int32_t entries, terms;
  MergeEntry entry[kEntries];
  const void* data[kTerms];
  double alpha[kTerms];
  uint8_t type[kTerms];
};
static_assert(sizeof(MergeTable) <= kTableBytes, "MergeTable is no kernel parameter");

// Fills `table` with items from `next` on that are summed in `sum`, and returns the first that is left; count when none is. No item may have more than kTerms terms.
inline size_t pack_merge(const MergeItem* items, size_t count, size_t next, Sum sum,
                         MergeTable& table) {
  table.chunks = table.entries = table.terms = 0;
  for (; next < count; ++next) {
    const MergeItem& item = items[next];
    if (item.sum != sum || item.numel == 0) continue;
    if (table.entries == MergeTable::kEntries || table.terms + item.count > MergeTable::kTerms) break;
    int widest = size_of(item.type);
    for (int64_t k = 0; k < item.count; ++k) {
      table.data[table.terms + k] = item.terms[k].data;
      table.alpha[table.terms + k] = item.terms[k].alpha;
      table.type[table.terms + k] = static_cast<uint8_t>(item.terms[k].type);
      widest = std::max(widest, size_of(item.terms[k].type));
    }
    struct Address {
      const void* data;
      Type type;
    };
    const auto address = [&](int64_t k) {
      return k ? Address{item.terms[k - 1].data, item.terms[k - 1].type}
               : Address{item.base, item.type};
    };
    int width = kAccessBytes / widest;
    int head = aligned_from(address, item.count + 1, width);
    if (head < 0) width = 1, head = 0;
    table.entry[table.entries++] = {item.base, item.numel, table.chunks, table.terms,
                                    static_cast<int32_t>(item.count), item.type,
                                    static_cast<int16_t>(width), static_cast<int16_t>(head)};
    table.terms += static_cast<int32_t>(item.count);
    table.chunks += std::max<int64_t>(chunks_of(item.numel - head, kMergeChunk), 1);
  }
  return next;
}

// A row of gram in tiles: `left` vectors among themselves, or each with each of `right` others.
constexpr int kLeft = 8, kRight = 4;

struct GramEntry {
  int64_t numel, first_chunk, first_part;
  int32_t first_vector;
  int16_t left, right;
  Type type;
  bool mixed, aligned;
};

struct GramTable {
  static constexpr int kEntries = 200, kVectors = 1800;
  int64_t chunks;
  int32_t entries, vectors;
  GramEntry entry[kEntries];
  const void* data[kVectors];
  int32_t owner[kVectors];
  uint8_t type[kVectors];
};
static_assert(sizeof(GramTable) <= kTableBytes, "GramTable is no kernel parameter");

inline int64_t gram_parts(const std::vector<GramRow>& rows) {
  int64_t parts = 0;
  for (const GramRow& row : rows) parts += chunks_of(row.numel, kGramPart);
  return parts;
}

// Calls launch(table) with every tile of every row that is `diagonal` or not, in few tables. The
// sums of a row's c-th chunk belong to part `first_part + c`.
template <class Launch>
void pack_gram(const std::vector<GramRow>& rows, const std::vector<Vector>& vectors,
               const int64_t* owners, bool diagonal, GramTable& table, const Launch& launch) {
  table.chunks = table.entries = table.vectors = 0;
  const auto flush = [&] {
    if (table.entries) launch(table);
    table.chunks = table.entries = table.vectors = 0;
  };
  int64_t first_part = 0;
  for (const GramRow& row : rows) {
    const int64_t parts = chunks_of(row.numel, kGramPart);
    for (int64_t i = 0; parts && i < row.count; i += kLeft) {
      for (int64_t j = 0; j < (diagonal ? 1 : i); j += kRight) {
        const int64_t left = std::min<int64_t>(kLeft, row.count - i);
        const int64_t right = diagonal ? 0 : std::min<int64_t>(kRight, i - j);
        if (table.entries == GramTable::kEntries || table.vectors + left + right > GramTable::kVectors)
          flush();
        const Type type = vectors[row.first + i].type;
        GramEntry entry{row.numel, table.chunks, first_part, table.vectors,
                        static_cast<int16_t>(left), static_cast<int16_t>(right), type, false, true};
        for (int64_t k = 0; k < left + right; ++k) {
          const size_t from = row.first + (k < left ? i + k : j + k - left);
          entry.mixed |= vectors[from].type != type;
          entry.aligned &= reinterpret_cast<uintptr_t>(vectors[from].data) % kAccessBytes == 0;
          table.data[table.vectors] = vectors[from].data;
          table.owner[table.vectors] = static_cast<int32_t>(owners[from]);
          table.type[table.vectors++] = static_cast<uint8_t>(vectors[from].type);
        }
        table.entry[table.entries++] = entry;
        table.chunks += parts;
      }
    }
    first_part += parts;
  }
  flush();
}

}  // namespace tangentfast
