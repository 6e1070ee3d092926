#include <array>
#include <cmath>
#include <limits>

#include "row_sparse/row_sparse.h"

namespace ubp {
namespace {

constexpr double kNegligible = 1e-12;

// Steps until a sum whose terms shrink by `ratio` has all but `kNegligible` of its first terms.
int64_t steps_until_negligible(double ratio) {
  if (ratio <= 0.0) return 1;
  if (ratio >= 1.0) return std::numeric_limits<int64_t>::max();
  return static_cast<int64_t>(std::ceil(std::log(kNegligible) / std::log(ratio)));
}

}  // namespace

int64_t adam_tails(const double* history, int64_t now, double beta1, double beta2, double eps,
                   AdamTail* tails) {
  const double root_decay = std::sqrt(beta2);
  std::array<double, kAdamTerms> shrink{}, sums{};
  for (int term = 0; term < kAdamTerms; ++term) shrink[term] = beta1 * std::pow(root_decay, -(term + 1));
  // The last term fades most slowly; where it does not fade at all, the series would never end.
  const bool has_series = shrink[kAdamTerms - 1] < 1.0;
  const int64_t horizon = steps_until_negligible(shrink[has_series ? kAdamTerms - 1 : 0]);
  double kept = 1.0;
  for (int64_t last = now; last >= 0; --last) {
    AdamTail& tail = tails[last];
    const double missed = static_cast<double>(now - last < horizon ? now - last : horizon);
    for (int term = 0; term < kAdamTerms; ++term) tail.terms[term] = static_cast<float>(sums[term]);
    tail.kept = static_cast<float>(kept);
    tail.least_root = has_series ? static_cast<float>(eps / kAdamRatio * std::pow(root_decay, -missed))
                                 : std::numeric_limits<float>::infinity();
    const double *step = history + 3 * last, rate = step[0], inverse_root = 1.0 / step[1], keep = step[2];
    if (last == 0) break;
    double power = inverse_root;
    for (int term = 0; term < kAdamTerms; ++term, power *= inverse_root)
      sums[term] = shrink[term] / keep * (rate * power + sums[term]);
    kept *= keep;
  }
  return horizon;
}

}  // namespace ubp
