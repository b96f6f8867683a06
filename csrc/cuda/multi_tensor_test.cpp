// The host side of the multi-tensor kernels: every element of every tensor is taken exactly once,
// whatever the sizes, alignments and numbers of tensors, and what goes into a launch fits.
#include "cuda/multi_tensor.h"

#include <cstdio>
#include <map>
#include <memory>
#include <vector>

#include "merge/table.h"
#include "testing.h"

using namespace tangentfast;

// Addresses that nobody reads.
void* address(uintptr_t at) { return reinterpret_cast<void*>(at); }

void check_spans(int64_t numel, int head, int width, int64_t chunk) {
  const int64_t chunks = std::max<int64_t>(chunks_of(numel - head, chunk), 1);
  int64_t next = 0;
  for (int64_t index = 0; index < chunks; ++index) {
    if (index == 3 && chunks > 6) {  // huge tensors: both ends
      index = chunks - 3;
      next = head + index * chunk;
    }
    const Span span = span_of(numel, head, width, chunk, index);
    CHECK(span.begin == next && span.begin <= span.from && span.from <= span.to &&
              span.to <= span.end && span.end > span.begin,
          "span %lld of %lld: %lld %lld %lld %lld", (long long)index, (long long)numel,
          (long long)span.begin, (long long)span.from, (long long)span.to, (long long)span.end);
    CHECK((span.from - head) % width == 0 || span.from == span.to, "span starts off a step");
    CHECK((span.to - span.from) % width == 0 && span.end - span.to < width, "span has a long tail");
    next = span.end;
  }
  CHECK(next == numel, "spans end at %lld of %lld", (long long)next, (long long)numel);
}

void check_merge_tables(const std::vector<MergeItem>& items) {
  const auto table = std::make_unique<MergeTable>();
  std::map<void*, int> seen;
  for (const Sum sum : {Sum::f32, Sum::f64, Sum::twice}) {
    for (size_t next = 0; next < items.size();) {
      const size_t before = next;
      next = pack_merge(items.data(), items.size(), next, sum, *table);
      CHECK(next > before, "pack_merge stands still at %zu", before);
      CHECK(table->entries <= MergeTable::kEntries && table->terms <= MergeTable::kTerms,
            "a table of %d entries and %d terms", table->entries, table->terms);
      int64_t chunk = 0;
      for (int e = 0; e < table->entries; ++e) {
        const MergeEntry& entry = table->entry[e];
        ++seen[entry.base];
        CHECK(entry.first_chunk == chunk, "entry %d begins at chunk %lld", e, (long long)chunk);
        const int64_t end = e + 1 < table->entries ? table->entry[e + 1].first_chunk : table->chunks;
        for (const int64_t at : {chunk, (chunk + end) / 2, end - 1}) {
          const int found = entry_of(table->entry, table->entries, at);
          CHECK(found == e, "chunk %lld is of entry %d, not %d", (long long)at, e, found);
        }
        const auto& item = items[reinterpret_cast<uintptr_t>(entry.base) >> 44];
        CHECK(entry.numel == item.numel && entry.count == item.count && item.sum == sum,
              "entry %d is not its item", e);
        const uintptr_t base = reinterpret_cast<uintptr_t>(entry.base);
        CHECK((base + entry.head * size_of(entry.type)) % (entry.width * size_of(entry.type)) == 0,
              "entry %d: base is not aligned", e);
        int widest = size_of(entry.type);
        for (int k = 0; k < entry.count; ++k) {
          const Term& term = item.terms[k];
          const int slot = entry.first_term + k, size = size_of(term.type);
          widest = std::max(widest, size);
          CHECK(table->data[slot] == term.data && table->alpha[slot] == term.alpha &&
                    Type(table->type[slot]) == term.type, "entry %d has another term %d", e, k);
          const uintptr_t at = reinterpret_cast<uintptr_t>(term.data) + entry.head * size;
          CHECK(at % (entry.width * size) == 0, "entry %d: term %d is not aligned", e, k);
        }
        CHECK(entry.width * widest <= kAccessBytes, "entry %d reads more than 16 bytes", e);
        check_spans(entry.numel, entry.head, entry.width, kMergeChunk);
        chunk = end;
      }
    }
  }
  size_t expected = 0;
  for (const MergeItem& item : items) expected += item.numel > 0;
  CHECK(seen.size() == expected, "%zu items in tables, expected %zu", seen.size(), expected);
  for (const auto& [base, times] : seen) CHECK(times == 1, "%p is taken %d times", base, times);
}

void check_gram_tables(const std::vector<GramRow>& rows, const std::vector<Vector>& vectors,
                       const std::vector<int64_t>& owners) {
  // (part, owner, owner) -> how often; only the first and last part of each entry
  std::map<std::tuple<int64_t, int, int>, int> seen;
  const auto table = std::make_unique<GramTable>();
  for (const bool diagonal : {true, false}) {
    pack_gram(rows, vectors, owners.data(), diagonal, *table, [&](const GramTable& given) {
      CHECK(given.entries && given.entries <= GramTable::kEntries &&
                given.vectors <= GramTable::kVectors,
            "a table of %d entries and %d vectors", given.entries, given.vectors);
      for (int e = 0; e < given.entries; ++e) {
        const GramEntry& entry = given.entry[e];
        const int64_t end = e + 1 < given.entries ? given.entry[e + 1].first_chunk : given.chunks;
        const int64_t parts = end - entry.first_chunk;
        CHECK(parts == chunks_of(entry.numel, kGramPart), "entry %d has %lld parts", e,
              (long long)parts);
        for (int i = 0; i < entry.left; ++i) {
          for (int j = 0; j < (diagonal ? i + 1 : entry.right); ++j) {
            const int row = given.owner[entry.first_vector + i];
            const int column = given.owner[entry.first_vector + (diagonal ? j : entry.left + j)];
            CHECK(row >= column, "pair %d, %d is above the diagonal", row, column);
            ++seen[{entry.first_part, row, column}];
          }
        }
      }
    });
  }
  size_t expected = 0;
  int64_t part = 0;
  for (const GramRow& row : rows) {
    if (row.numel == 0) continue;
    for (int64_t i = 0; i < row.count; ++i) {
      for (int64_t j = 0; j <= i; ++j, ++expected) {
        const int times = seen[{part, int(owners[row.first + i]), int(owners[row.first + j])}];
        CHECK(times == 1, "pair %d, %d is summed %d times", int(i), int(j), times);
      }
    }
    part += chunks_of(row.numel, kGramPart);
  }
  CHECK(seen.size() == expected, "%zu pairs, expected %zu", seen.size(), expected);
  CHECK(gram_parts(rows) == part, "%lld parts", (long long)part);
}

int main() {
  constexpr Type types[] = {Type::f64, Type::f32, Type::f16, Type::bf16};
  const int64_t huge = (int64_t{1} << 33) + 5;
  for (const int width : {1, 2, 4, 8}) {
    for (int head = 0; head < width; ++head) {
      for (const int64_t numel : {1, 3, 8, 63, 64, 65, 1000, 128, 129}) {
        if (numel > head) check_spans(numel, head, width, 64);
      }
      check_spans(huge, head, width, 64);
    }
  }
  for (const int count : {1, 3, 8, MergeTable::kTerms}) {
    for (const size_t tensors : {0, 1, 179, 180, 181, 500}) {
      std::vector<std::vector<Term>> terms(tensors);
      std::vector<MergeItem> items;
      for (size_t i = 0; i < tensors; ++i) {
        // The number of the item is in the address, and so is every alignment of its type.
        const auto at = [&](Type type, size_t k) {
          return address((uintptr_t{i} << 44) + ((k + 1) << 36) + (i / 3 + k * (i % 2)) % 16 *
                                                                    size_of(type));
        };
        for (int k = 0; k < count; ++k) {
          const Type type = types[(i % 5 ? i : i + k) % 4];
          terms[i].push_back({at(type, k + 1), type, 0.5 * k});
        }
        const Type type = types[i / 7 % 4];
        const int64_t numel = i % 11 == 10 ? huge : int64_t(i * i % 40000);
        items.push_back({at(type, 0), type, sum_of(type, terms[i].data(), count), numel,
                         terms[i].data(), count, 0, nullptr, nullptr});
      }
      check_merge_tables(items);
    }
  }
  for (const int64_t count : {0, 1, 4, 8, 9, 13, 40}) {
    for (const size_t tensors : {0, 1, 199, 201}) {
      std::vector<GramRow> rows;
      std::vector<Vector> vectors;
      std::vector<int64_t> owners;
      for (size_t r = 0; r < tensors; ++r) {
        const int64_t numel = r % 7 == 6 ? huge : r % 5 ? int64_t(r * 10000) : 0;
        rows.push_back({vectors.size(), count, numel});
        for (int64_t k = 0; k < count; ++k) {
          vectors.push_back({address((r + 1) << 20), types[r % 3 ? r % 4 : k % 4]});
          owners.push_back(2 * k);
        }
      }
      std::vector<GramRow> present;
      for (const GramRow& row : rows) {
        if (row.count) present.push_back(row);
      }
      check_gram_tables(present, vectors, owners);
    }
  }
  return FAILED();
}
