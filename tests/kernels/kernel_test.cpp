// The compiled kernels against plain sums in double, without Python: for machines that are emulated, where a
// PyTorch would take hours. `make test-arm64` builds it for ARM64 and runs it; the Python tests ask more, on
// the machine at hand.
//
// Every instruction set of the processor takes part. Prints the largest share of its bound that each
// operator's error took, and ends with 1 where one was exceeded. Arguments: instruction sets that must be
// there.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/convert.h"
#include "common/dispatch.h"

namespace {

using Doubles = std::vector<double>;
std::mt19937_64 generator;
bool is_failed = false;

double normal() { return std::normal_distribution<double>{}(generator); }
int64_t below(int64_t bound) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(bound)); }

template <class T>
constexpr ubp::DType kDType = ubp::DType::kFloat32;
template <>
constexpr ubp::DType kDType<ubp::BFloat16> = ubp::DType::kBFloat16;
template <>
constexpr ubp::DType kDType<ubp::Float16> = ubp::DType::kFloat16;
template <class T>
constexpr double kEpsilon = 0x1p-23;
template <>
constexpr double kEpsilon<ubp::BFloat16> = 0x1p-7;
template <>
constexpr double kEpsilon<ubp::Float16> = 0x1p-10;

// Numbers of a type, and the same as doubles.
template <class T>
struct Numbers {
  std::vector<T> stored;
  Doubles exact;

  explicit Numbers(int64_t count) : stored(count), exact(count) {
    for (int64_t at = 0; at < count; ++at) {
      ubp::from_float(static_cast<float>(normal()), stored[at]);
      exact[at] = ubp::to_float(stored[at]);
    }
  }
};

class Comparison {
 public:
  explicit Comparison(std::string name) : name_(std::move(name)) {}

  // Errors may be `roundings` of the largest number.
  template <class T>
  void add(const char* what, const T* found, const Doubles& truth, double roundings) {
    double largest = 0;
    for (const double number : truth) largest = std::max(largest, std::fabs(number));
    const double bound = roundings * kEpsilon<T> * largest + 1e-30;
    for (size_t at = 0; at < truth.size(); ++at) {
      const double share = std::fabs(static_cast<double>(number_of(found[at])) - truth[at]) / bound;
      if (share <= worst_) continue;  // NaN is worse than anything
      worst_ = share;
      where_ = std::string(what) + "[" + std::to_string(at) + "] of " + std::to_string(truth.size());
      if (!(share <= 1)) break;
    }
  }

  ~Comparison() {
    const bool is_good = worst_ <= 1;
    std::printf("%-34s %-12s %.2f of the bound, %s%s\n", name_.c_str(), ubp::kernels().isa, worst_,
                where_.c_str(), is_good ? "" : "  FAILED");
    if (!is_good) is_failed = true;
  }

 private:
  template <class T>
  static double number_of(T number) {
    if constexpr (std::is_arithmetic_v<T>)
      return static_cast<double>(number);
    else
      return ubp::to_float(number);
  }

  std::string name_, where_;
  double worst_ = 0;
};

// Salmon et al. 2011, word 0 of ten rounds.
uint32_t philox(uint32_t a, uint32_t b, uint32_t c, uint64_t seed) {
  uint32_t d = 0, low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
    const uint64_t left = uint64_t{a} * 0xD2511F53u, right = uint64_t{c} * 0xCD9E8D57u;
    a = static_cast<uint32_t>(right >> 32) ^ b ^ low;
    b = static_cast<uint32_t>(right);
    c = static_cast<uint32_t>(left >> 32) ^ d ^ high;
    d = static_cast<uint32_t>(left);
  }
  return a;
}

template <class T>
void test_attention(const char* type, int64_t width, bool has_bias, double dropout, int64_t left,
                    int64_t right) {
  const std::vector<int32_t> offsets{0, 1, 1, 18, 83, 360};
  const int64_t sequences = static_cast<int64_t>(offsets.size()) - 1, tokens = offsets.back(), heads = 2,
                buckets = 40, size = tokens * heads * width;
  Numbers<T> query(size), key(size), value(size), grad(size);
  Numbers<float> bias(heads * buckets);
  std::vector<int64_t> times(tokens);
  for (int64_t& time : times) time = below(1'000'000);
  std::vector<T> output(size), grad_query(size), grad_key(size), grad_value(size);
  std::vector<float> lse(tokens * heads), grad_bias(heads * buckets);
  std::vector<ubp::FlashAttentionItem> items;
  for (int32_t b = 0; b < sequences; ++b) {
    if (offsets[b + 1] == offsets[b]) continue;
    if (b % 2 == 0) items.push_back({b, 0, static_cast<int32_t>(heads)});
    if (b % 2 == 1) items.insert(items.end(), {{b, 0, 1}, {b, 1, 1}});
  }
  ubp::FlashAttentionProblem problem{};
  problem.query = query.stored.data(), problem.key = key.stored.data(), problem.value = value.stored.data();
  problem.cu_query = problem.cu_key = offsets.data();
  problem.query_tokens = problem.key_tokens = tokens;
  problem.items = items.data(), problem.item_count = static_cast<int64_t>(items.size());
  problem.sequences = sequences, problem.heads = heads, problem.width = width, problem.dtype = kDType<T>;
  problem.left = left, problem.right = right;
  problem.scale = 1.f / std::sqrt(static_cast<float>(width));
  if (has_bias) {
    problem.time_bias = bias.stored.data(), problem.query_time_s = problem.key_time_s = times.data();
    problem.buckets = buckets, problem.grad_time_bias = grad_bias.data();
  }
  problem.threshold = static_cast<uint32_t>(dropout * 0x1p32);
  problem.keep_factor = static_cast<float>(1 / (1 - dropout));
  problem.seed = 0x123456789abcdefull;
  problem.threads = 2;
  problem.output = output.data(), problem.lse = lse.data(), problem.grad_output = grad.stored.data();
  problem.grad_query = grad_query.data(), problem.grad_key = grad_key.data(),
  problem.grad_value = grad_value.data();
  ubp::kernels().flash_attention_forward(problem);
  ubp::kernels().flash_attention_backward(problem);

  Doubles o(size), dq(size), dk(size), dv(size), db(heads * buckets), log_sums(tokens * heads);
  for (int64_t b = 0; b < sequences; ++b)
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
        const auto row = [&](int64_t token) { return (token * heads + head) * width; };
        const int64_t first = left < 0 ? offsets[b] : std::max<int64_t>(offsets[b], i - left),
                      last = right < 0 ? offsets[b + 1] : std::min<int64_t>(offsets[b + 1], i + right + 1);
        Doubles scores, keeps, products;
        std::vector<int64_t> places;
        double sum = 0, delta = 0;
        for (int64_t j = first; j < last; ++j) {
          double score = 0, product = 0;
          for (int64_t d = 0; d < width; ++d) {
            score += query.exact[row(i) + d] * key.exact[row(j) + d];
            product += grad.exact[row(i) + d] * value.exact[row(j) + d];
          }
          const double apart = 1.0 + std::fabs(static_cast<double>(times[i] - times[j]));
          const int exponent = std::ilogb(apart);
          const int64_t bucket =
              std::min<int64_t>(buckets - 1, 2 * exponent + (apart >= 1.5 * std::ldexp(1.0, exponent)));
          places.push_back(head * buckets + bucket);
          scores.push_back(score * problem.scale + (has_bias ? bias.exact[places.back()] : 0));
          const bool is_kept = philox(static_cast<uint32_t>(j), static_cast<uint32_t>(i),
                                      static_cast<uint32_t>(head), problem.seed) >= problem.threshold;
          keeps.push_back(is_kept ? 1 / (1 - dropout) : 0);
          products.push_back(product);
          sum += std::exp(scores.back());
        }
        log_sums[i * heads + head] = std::log(sum);
        for (int64_t j = first; j < last; ++j) {
          const double weight = std::exp(scores[j - first]) / sum * keeps[j - first];
          delta += weight * products[j - first];
          for (int64_t d = 0; d < width; ++d) {
            o[row(i) + d] += weight * value.exact[row(j) + d];
            dv[row(j) + d] += weight * grad.exact[row(i) + d];
          }
        }
        for (int64_t j = first; j < last; ++j) {
          const double slope =
              std::exp(scores[j - first]) / sum * (keeps[j - first] * products[j - first] - delta);
          if (has_bias) db[places[j - first]] += slope;
          for (int64_t d = 0; d < width; ++d) {
            dq[row(i) + d] += slope * problem.scale * key.exact[row(j) + d];
            dk[row(j) + d] += slope * problem.scale * query.exact[row(i) + d];
          }
        }
      }
  Comparison comparison("flash_attention " + std::string(type) + " D=" + std::to_string(width) +
                        (has_bias ? " time" : "") + (dropout > 0 ? " dropout" : "") +
                        (left >= 0 ? " window" : ""));
  const double roundings = sizeof(T) == 4 ? 16 : 2;
  comparison.add("output", output.data(), o, roundings);
  comparison.add("grad_query", grad_query.data(), dq, roundings);
  comparison.add("grad_key", grad_key.data(), dk, roundings);
  comparison.add("grad_value", grad_value.data(), dv, roundings);
  comparison.add("lse", lse.data(), log_sums, roundings * kEpsilon<T> / kEpsilon<float>);
  if (has_bias) comparison.add("grad_bias", grad_bias.data(), db, roundings * kEpsilon<T> / kEpsilon<float>);
}

template <class T>
void test_nt_xent(const char* type, ubp::NTXentForm form, int64_t count, int64_t width) {
  const double temperature = 0.2;
  Numbers<T> left(count * width), right(count * width);
  const bool is_cross = form == ubp::NTXentForm::kCross;
  const int64_t rows = is_cross ? count : 2 * count;
  std::vector<int64_t> kept(count);
  std::vector<int32_t> ids(count);
  for (int64_t row = 0; row < count; ++row)
    kept[row] = row, ids[row] = static_cast<int32_t>(row % (count - 2));
  std::vector<float> weight(rows);
  for (float& number : weight) number = static_cast<float>(below(1000)) / 1000.f;
  Doubles losses(rows), shares(rows);
  std::vector<T> grad_left(count * width), grad_right(count * width);
  double moment = 0;
  ubp::NTXentProblem problem{};
  problem.left = left.stored.data(), problem.right = right.stored.data(), problem.dtype = kDType<T>;
  problem.left_kept = problem.right_kept = kept.data(), problem.left_ids = problem.right_ids = ids.data();
  problem.left_rows = problem.right_rows = problem.left_count = problem.right_count = count;
  problem.width = width, problem.form = form, problem.has_ids = true, problem.is_normalized = true;
  problem.temperature = temperature, problem.threads = 2, problem.losses = losses.data();
  problem.weight = weight.data(), problem.shares = shares.data(), problem.factor = 1 / temperature;
  problem.grad_left = grad_left.data(), problem.grad_right = grad_right.data(), problem.moment = &moment;
  ubp::kernels().nt_xent_forward(problem);
  for (int64_t row = 0; row < rows; ++row) shares[row] = -std::expm1(-losses[row]);
  ubp::kernels().nt_xent_backward(problem);

  Doubles unit = left.exact, lengths(2 * count), slopes(2 * count * width), true_losses(rows);
  unit.insert(unit.end(), right.exact.begin(), right.exact.end());
  for (int64_t row = 0; row < 2 * count; ++row) {
    for (int64_t d = 0; d < width; ++d) lengths[row] += unit[row * width + d] * unit[row * width + d];
    lengths[row] = std::sqrt(lengths[row]);
    for (int64_t d = 0; d < width; ++d) unit[row * width + d] /= lengths[row];
  }
  double true_moment = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = form == ubp::NTXentForm::kSimclr || i >= count ? 0 : count,
                  end = form == ubp::NTXentForm::kSimclr || i < count ? 2 * count : count,
                  partner = (i + count) % (2 * count);
    const auto similarity = [&](int64_t j) {
      double sum = 0;
      for (int64_t d = 0; d < width; ++d) sum += unit[i * width + d] * unit[j * width + d];
      return sum / temperature;
    };
    const double positive = similarity(partner);
    Doubles gaps(2 * count, -std::numeric_limits<double>::infinity());
    double sum = 1;
    for (int64_t j = begin; j < end; ++j)
      if (ids[j % count] != ids[i % count]) gaps[j] = similarity(j) - positive, sum += std::exp(gaps[j]);
    true_losses[i] = std::log(sum);
    const auto add = [&](int64_t j, double slope) {
      for (int64_t d = 0; d < width; ++d) {
        slopes[i * width + d] += slope / temperature * unit[j * width + d];
        slopes[j * width + d] += slope / temperature * unit[i * width + d];
      }
    };
    add(partner, weight[i] * (1 / sum - 1));
    for (int64_t j = begin; j < end; ++j) {
      if (gaps[j] == -std::numeric_limits<double>::infinity()) continue;
      const double share = std::exp(gaps[j]) / sum;
      add(j, weight[i] * share);
      true_moment += weight[i] * share * gaps[j];
    }
  }
  for (int64_t row = 0; row < 2 * count; ++row) {
    double along = 0;
    for (int64_t d = 0; d < width; ++d) along += slopes[row * width + d] * unit[row * width + d];
    for (int64_t d = 0; d < width; ++d) {
      double& slope = slopes[row * width + d];
      slope = (slope - along * unit[row * width + d]) / lengths[row];
    }
  }
  Comparison comparison("nt_xent " + std::string(type) + " form " + std::to_string(static_cast<int>(form)) +
                        " N=" + std::to_string(count) + " E=" + std::to_string(width));
  const double roundings = sizeof(T) == 4 ? 4 : 1, ratio = kEpsilon<T> / kEpsilon<double>;
  const auto half = static_cast<std::ptrdiff_t>(count * width);
  comparison.add("losses", losses.data(), true_losses, roundings * ratio);
  comparison.add("moment", &moment, {true_moment}, 64 * roundings * ratio);
  comparison.add("grad_left", grad_left.data(), Doubles(slopes.begin(), slopes.begin() + half), roundings);
  comparison.add("grad_right", grad_right.data(), Doubles(slopes.begin() + half, slopes.end()), roundings);
}

template <class Real>
void test_product(void (*ubp::RowProductKernels::*function)(const ubp::RowProduct<Real>&), const char* type) {
  Comparison comparison("row_product " + std::string(type));
  for (const int64_t count : {1, 7, 100})
    for (const int64_t outputs : {5, 8, 33}) {
      const int64_t inputs = 70;
      std::vector<Real> rows(count * inputs), weight(inputs * outputs), bias(outputs), out(count * outputs);
      for (auto* numbers : {&rows, &weight, &bias})
        for (Real& number : *numbers) number = static_cast<Real>(normal());
      (ubp::kernels().row_product.*
       function)({rows.data(), weight.data(), bias.data(), out.data(), count, inputs, outputs});
      Doubles truth(count * outputs);
      for (int64_t at = 0; at < count * outputs; ++at) {
        truth[at] = bias[at % outputs];
        for (int64_t input = 0; input < inputs; ++input)
          truth[at] += static_cast<double>(rows[at / outputs * inputs + input]) *
                       weight[input * outputs + at % outputs];
      }
      comparison.add("out", out.data(), truth, sizeof(Real) == 4 ? 16 : 32 * 0x1p-52 / kEpsilon<double>);
    }
}

void test_pairs() {
  const int64_t clients = 3, labels = 150, both = 2, width = 5, first = 24, second = 12;
  const auto numbers = [](int64_t count) { return Numbers<float>(count); };
  const auto of_client = numbers(clients * first), of_label = numbers(first * labels),
             of_both = numbers(clients * both * labels), both_weight = numbers(both * first),
             inputs = numbers(6 * width), input_weight = numbers(width * first),
             weight = numbers(second * first), bias = numbers(second), last_weight = numbers(second),
             last_bias = numbers(1);
  const std::vector<int64_t> offsets{0, 2, 2, 6};
  const std::vector<int32_t> label{3, 149, 0, 1, 127, 128};
  std::vector<float> out(clients * labels), units((2 * first + second) * ubp::kLabelsAtOnce);
  ubp::kernels().row_product.of_pairs(
      {of_client.stored.data(), of_label.stored.data(), of_both.stored.data(), both_weight.stored.data(),
       offsets.data(), label.data(), inputs.stored.data(), input_weight.stored.data(), weight.stored.data(),
       bias.stored.data(), last_weight.stored.data(), last_bias.stored.data(), out.data(), clients, labels,
       both, width, first, second},
      units.data());
  Doubles truth(clients * labels);
  for (int64_t c = 0; c < clients; ++c)
    for (int64_t l = 0; l < labels; ++l) {
      Doubles h(first);
      for (int64_t u = 0; u < first; ++u) {
        h[u] = of_client.exact[c * first + u] + of_label.exact[u * labels + l];
        for (int64_t j = 0; j < both; ++j)
          h[u] += of_both.exact[(c * both + j) * labels + l] * both_weight.exact[j * first + u];
        for (int64_t pair = offsets[c]; pair < offsets[c + 1]; ++pair)
          for (int64_t at = 0; at < width && label[pair] == l; ++at)
            h[u] += inputs.exact[pair * width + at] * input_weight.exact[at * first + u];
      }
      truth[c * labels + l] = last_bias.exact[0];
      for (int64_t k = 0; k < second; ++k) {
        double sum = bias.exact[k];
        for (int64_t u = 0; u < first; ++u) sum += weight.exact[k * first + u] * std::max(0.0, h[u]);
        truth[c * labels + l] += last_weight.exact[k] * std::max(0.0, sum);
      }
    }
  Comparison("pair_network").add("out", out.data(), truth, 16);
}

// A table whose rows get gradients now and then, beside one whose rows all take every step.
template <class Rule, class Dense>
void test_table(const char* name, ubp::RowSparseRuleKernels<Rule> ubp::RowSparseKernels::* kernels, Rule rule,
                const typename Rule::Step& step, const Doubles& history_of_step, Dense dense) {
  const int64_t rows = 90, width = 37;
  Numbers<float> weight(rows * width);
  Doubles w = weight.exact, first(rows * width), second(rows * width), history = history_of_step;
  for (double& number : history) number = 1.0;  // entry 0
  std::vector<float> state(rows * 2 * width);
  std::vector<int32_t> slot(rows), last(rows, -1);
  int64_t used = 0;
  Comparison comparison("row_sparse " + std::string(name));
  for (int64_t now = 0; now < 12; ++now) {
    std::vector<int64_t> ids;
    for (int64_t row = 0; row < rows; ++row)
      if (below(3) == 0) ids.push_back(row);
    const auto count = static_cast<int64_t>(ids.size());
    for (const int64_t id : ids)
      if (last[id] < 0) slot[id] = static_cast<int32_t>(used++);
    const ubp::RowTable table{weight.stored.data(),
                              state.data(),
                              slot.data(),
                              last.data(),
                              history.data(),
                              &used,
                              rows,
                              width,
                              now,
                              rows};
    std::vector<ubp::AdamTail> tails(now + 1);
    if constexpr (std::is_same_v<Rule, ubp::Adam>) {
      rule.horizon = ubp::adam_tails(history.data(), now, rule.beta1, rule.beta2, rule.eps, tails.data());
      rule.tails = tails.data();
    }
    std::vector<float> found(rows * width);
    std::vector<int64_t> all(rows);
    for (int64_t row = 0; row < rows; ++row) all[row] = row;
    (ubp::kernels().row_sparse.*kernels).gather({table, rule, all.data(), rows, found.data(), 2});
    comparison.add("weights", found.data(), w, 32);
    // Each gradient comes as two halves.
    Numbers<float> halves(2 * count * width);
    std::vector<int64_t> start(count + 1), order(2 * count);
    for (int64_t at = 0; at < count; ++at)
      start[at + 1] = 2 * (at + 1), order[2 * at] = at, order[2 * at + 1] = count + at;
    std::vector<float> gradient(count * width);
    ubp::kernels().row_sparse.reduce(
        {start.data(), order.data(), count, width, width, halves.stored.data(), gradient.data(), 2});
    (ubp::kernels().row_sparse.*kernels).update({table, rule, step, ids.data(), count, gradient.data(), 2});
    Doubles g(rows * width);
    for (int64_t at = 0; at < count; ++at)
      for (int64_t d = 0; d < width; ++d)
        g[ids[at] * width + d] = halves.exact[at * width + d] + halves.exact[(count + at) * width + d];
    for (int64_t at = 0; at < rows * width; ++at)
      dense(w[at], first[at], second[at], g[at], now == 0 || (first[at] == 0 && second[at] == 0));
    for (const double number : history_of_step)
      history.push_back(history_of_step.size() == 1 ? history.back() * number : number);
  }
}

void test_tables() {
  const double eps = 1e-8, beta2 = static_cast<float>(0.999);
  const ubp::ScheduleFree::Step step{0.01f, 0.125f, 0.004f, 0.5f, true};
  test_table("schedule-free", &ubp::RowSparseKernels::schedule_free,
             ubp::ScheduleFree{0.999, static_cast<float>(eps), 0.f}, step, {1 - 0.125},
             [&](double& y, double& z, double& v, double g, bool is_new) {
               if (is_new) z = y;
               v = beta2 * v + (1 - 0.999) * g * g;
               const double direction = g / (std::sqrt(v / 0.5) + eps);
               y = z + (y - z) * (1 - 0.125) + direction * static_cast<double>(step.gradient_weight);
               z -= direction * static_cast<double>(step.learning_rate);
             });
  const double first_new = static_cast<float>(0.1), second_new = static_cast<float>(0.001);
  const ubp::Adam::Step adam_step{0.01f, 1.5f, 0.999f};
  test_table("Adam", &ubp::RowSparseKernels::adam,
             ubp::Adam{1 - first_new, beta2, eps, static_cast<float>(first_new),
                       static_cast<float>(second_new), 0, nullptr},
             adam_step, {static_cast<double>(adam_step.rate), 1.5, static_cast<double>(adam_step.keep)},
             [&](double& w, double& m, double& v, double g, bool) {
               m += first_new * (g - m);
               v = beta2 * v + second_new * g * g;
               w = w * static_cast<double>(adam_step.keep) -
                   (m == 0 ? 0 : static_cast<double>(adam_step.rate) * m / (std::sqrt(v) * 1.5 + eps));
             });
}

template <class T>
void test_type(const char* type) {
  for (const int64_t width : {2, 5, 16, 33, 64, 100}) test_attention<T>(type, width, false, 0, -1, -1);
  test_attention<T>(type, 32, true, 0.3, -1, 0);
  test_attention<T>(type, 48, false, 0, 20, 3);
  for (const auto form : {ubp::NTXentForm::kCross, ubp::NTXentForm::kSymmetric, ubp::NTXentForm::kSimclr}) {
    test_nt_xent<T>(type, form, 5, 3);
    // More than what is computed in double.
    if (form == ubp::NTXentForm::kSimclr) test_nt_xent<T>(type, form, 301, 101);
    if (form == ubp::NTXentForm::kCross) test_nt_xent<T>(type, form, 601, 101);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> isas = ubp::usable_isas();
  for (int at = 1; at < argc; ++at)
    if (std::find(isas.begin(), isas.end(), argv[at]) == isas.end()) {
      std::fprintf(stderr, "this processor, or this build, has no %s\n", argv[at]);
      return 1;
    }
  for (const std::string& isa : isas) {
    ubp::set_isa(isa);
    generator.seed(1);  // the same numbers for all
    test_type<float>("float32");
    test_type<ubp::BFloat16>("bfloat16");
    test_type<ubp::Float16>("float16");
    test_product(&ubp::RowProductKernels::of_floats, "float32");
    test_product(&ubp::RowProductKernels::of_doubles, "float64");
    test_pairs();
    test_tables();
  }
  return is_failed ? 1 : 0;
}
