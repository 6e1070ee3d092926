#include <algorithm>
#include <array>
#include <numeric>
#include <utility>
#include <vector>

#include "row_sparse/row_sparse.h"

namespace ubp {
namespace {

constexpr int kBits = 11;
constexpr int64_t kDigits = int64_t{1} << kBits;

// One stable pass of a radix sort over the digit that starts at bit `shift`.
void sort_by_digit(const int64_t* ids, int64_t count, int shift, const int64_t* from, int64_t* to) {
  std::array<int64_t, kDigits> place{};
  const auto digit = [&](int64_t at) { return (ids[from[at]] >> shift) & (kDigits - 1); };
  for (int64_t at = 0; at < count; ++at) ++place[digit(at)];
  int64_t sum = 0;
  for (int64_t& entry : place) sum += std::exchange(entry, sum);
  for (int64_t at = 0; at < count; ++at) to[place[digit(at)]++] = from[at];
}

}  // namespace

int64_t group_ids(const int64_t* ids, int64_t count, int64_t* order, int64_t* distinct, int64_t* start) {
  std::vector<int64_t> other(count);
  int64_t *from = order, *to = other.data();
  std::iota(order, order + count, 0);
  const int64_t largest = count != 0 ? *std::max_element(ids, ids + count) : 0;
  for (int shift = 0; shift < 63 && (largest >> shift) != 0; shift += kBits) {
    sort_by_digit(ids, count, shift, from, to);
    std::swap(from, to);
  }
  if (from != order) std::copy(from, from + count, order);
  int64_t groups = 0;
  for (int64_t at = 0; at < count; ++at) {
    if (at != 0 && ids[order[at]] == distinct[groups - 1]) continue;
    distinct[groups] = ids[order[at]];
    start[groups++] = at;
  }
  start[groups] = count;
  return groups;
}

}  // namespace ubp
