// The kernels of attention, of the short convolution and of float matrices: each target's against the scalar ones.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "expect.h"
#include "guarded_buffer.h"
#include "target.h"

namespace {

using lfm2::HeadCache;
using lfm2::Target;
using lfm2_test::Buffer;

std::mt19937 random_bits(11);

void fill_normal(const Buffer<float>& buffer) {
  std::normal_distribution<float> distribution(0.0f, 1.0f);
  for (float& value : buffer) {
    value = distribution(random_bits);
  }
}

// Keys and values of one head, and queries with what each may see.
struct Head {
  int64_t head_dim, positions, queries;
  bool is_int8;
  Buffer<uint8_t> key, value;
  Buffer<float> q;
  Buffer<int64_t> begins, ends, mask;

  Head(int64_t dim, int64_t held, int64_t count, bool int8)
      : head_dim(dim), positions(held), queries(count), is_int8(int8),
        key(held * lfm2::cache_row_bytes(dim, int8)), value(held * lfm2::cache_row_bytes(dim, int8)),
        q(count * dim), begins(count), ends(count), mask(held) {
    fill_normal(q);
    const Buffer<float> row(dim);
    for (int64_t at = 0; at < held; ++at) {
      for (const Buffer<uint8_t>* cache : {&key, &value}) {
        fill_normal(row);
        lfm2::scalar::kAttentionKernels.store(row.data(), of(*cache), at);
      }
      mask[at] = at % 7 != 3;
    }
    for (int64_t i = 0; i < count; ++i) {
      ends[i] = held - (count - 1 - i) % held;
      begins[i] = i % 3 == 2 ? ends[i] / 2 : 0;
    }
  }

  HeadCache of(const Buffer<uint8_t>& cache) const { return {cache.data(), head_dim, is_int8}; }
  std::string described() const {
    return std::to_string(positions) + " positions of " + std::to_string(head_dim) + (is_int8 ? " int8" : " floats");
  }

  // out [count, head_dim]: what queries first .. first + count - 1 see.
  void run(const Target& target, int64_t first, int64_t count, const Buffer<float>& out) const {
    const Buffer<float> greatest(count, -INFINITY), weight(count, 0.0f), sum(count * head_dim, 0.0f);
    const Buffer<char> scratch(lfm2::attention_scratch_floats(head_dim) * 4);
    const lfm2::QueryTile tile = {q.data() + first * head_dim, begins.data() + first, ends.data() + first, mask.data(),
                                  count, greatest.data(), weight.data(), sum.data()};
    target.attention.attend(of(key), of(value), 0, positions, tile, reinterpret_cast<float*>(scratch.data()));
    for (int64_t i = 0; i < count * head_dim; ++i) {
      out[i] = sum[i] / weight[i / head_dim];
    }
  }
};

// Behind an origin, and without a mask: what the same rows give at their own positions under a mask of ones.
void check_origin(const Target& target, Head head) {
  constexpr int64_t kOrigin = 320;
  const int64_t count = head.queries, dim = head.head_dim;
  std::fill(head.mask.begin(), head.mask.end(), 1);
  const Buffer<float> want(count * dim), greatest(count, -INFINITY), weight(count, 0.0f), sum(count * dim, 0.0f);
  head.run(target, 0, count, want);
  for (int64_t i = 0; i < count; ++i) {
    head.begins[i] += kOrigin;
    head.ends[i] += kOrigin;
  }
  HeadCache key = head.of(head.key), value = head.of(head.value);
  key.origin = value.origin = kOrigin;
  const Buffer<char> scratch(lfm2::attention_scratch_floats(dim) * 4);
  const lfm2::QueryTile tile = {head.q.data(), head.begins.data(), head.ends.data(), nullptr, count,
                                greatest.data(), weight.data(), sum.data()};
  target.attention.attend(key, value, kOrigin, kOrigin + head.positions, tile,
                          reinterpret_cast<float*>(scratch.data()));
  for (int64_t i = 0; i < count * dim; ++i) {
    sum[i] /= weight[i / dim];
  }
  expect(std::memcmp(sum.data(), want.data(), sum.size() * sizeof(float)) == 0,
         std::string(target.name) + " attention, " + head.described() + ": an origin changes the result");
}

double difference(const Buffer<float>& got, const Buffer<float>& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(error / size);
}

double worst[2] = {};  // of floats, of int8
constexpr double kBound = 4.5e-6, kInt8Bound = 7e-4;  // 1.7 times (int8: three times) the most that was seen

void check_attention(const Target& target, const Head& head) {
  const int64_t count = head.queries;
  const Buffer<float> got(count * head.head_dim), want(count * head.head_dim), alone(head.head_dim);
  head.run(target, 0, count, got);
  head.run(*lfm2::target_by_name("scalar"), 0, count, want);
  const double error = difference(got, want), bound = head.is_int8 ? kInt8Bound : kBound;
  worst[head.is_int8] = std::max(worst[head.is_int8], error);
  const std::string what = std::string(target.name) + " attention, " + head.described();
  expect(error < bound, what + ": differs from scalar by " + std::to_string(error));
  for (int64_t query = 0; query < count; ++query) {
    head.run(target, query, 1, alone);
    expect(std::memcmp(alone.data(), got.data() + query * head.head_dim, head.head_dim * sizeof(float)) == 0,
           what + ": a query depends on the others");
  }
  for (float& value : head.q) {
    value *= 1.1f;  // the control: other queries
  }
  head.run(target, 0, count, want);
  expect(head.positions == 1 || difference(got, want) > 2 * bound, what + ": other queries are not noticed");
}

// NaN in a query stays there; in a key, it gets to those that see it.
void check_not_a_number(const Target& target, const Head& head) {
  const int64_t count = head.queries, dim = head.head_dim;
  const Buffer<float> clean(count * dim), got(count * dim), row(dim, 1.0f);
  const std::string what = std::string(target.name) + " attention, " + head.described();
  head.run(target, 0, count, clean);
  const float before = head.q[dim + 2];
  head.q[dim + 2] = std::numeric_limits<float>::quiet_NaN();
  head.run(target, 0, count, got);
  for (int64_t i = 0; i < count * dim; ++i) {
    expect(i / dim == 1 ? std::isnan(got[i]) : got[i] == clean[i], what + ": a query's NaN is lost, or spreads");
  }
  head.q[dim + 2] = before;
  row[5] = std::numeric_limits<float>::quiet_NaN();
  lfm2::scalar::kAttentionKernels.store(row.data(), head.of(head.key), 0);
  head.run(target, 0, count, got);
  for (int64_t i = 0; i < count * dim; ++i) {
    expect(head.begins[i / dim] == 0 ? std::isnan(got[i]) : got[i] == clean[i],
           what + ": a key's NaN is lost, or spreads");
  }
}

void check_stores(const Target& target) {
  for (const int64_t dim : {16, 80, 128}) {
    const Buffer<float> x(dim);
    fill_normal(x);
    for (const float odd : {1.0f, INFINITY, std::numeric_limits<float>::quiet_NaN(), 0.0f}) {
      x[3] = odd;
      const Buffer<uint8_t> got(lfm2::cache_row_bytes(dim, true)), want(got.size());
      target.attention.store(x.data(), {got.data(), dim, true}, 0);
      lfm2::scalar::kAttentionKernels.store(x.data(), {want.data(), dim, true}, 0);
      expect(std::memcmp(got.data(), want.data(), got.size()) == 0, std::string(target.name) + ": stores other codes");
    }
  }
}

// Loops that add in one order: the same bits everywhere.
void check_loops(const Target& target) {
  constexpr int64_t kTokens = 5, kInputs = 40, kOutputs = 45, kTaps = 3;
  const Buffer<float> x(kTokens * kInputs), w(kInputs * kOutputs), got(kTokens * kOutputs), want(kTokens * kOutputs);
  fill_normal(x);
  fill_normal(w);
  target.floats.multiply({x.data(), w.data(), kTokens, kInputs, kOutputs, got.data()}, 0, kTokens, 0, kOutputs);
  lfm2::scalar::kFloatKernels.multiply({x.data(), w.data(), kTokens, kInputs, kOutputs, want.data()}, 0, kTokens, 0,
                                       kOutputs);
  expect(std::memcmp(got.data(), want.data(), got.size() * sizeof(float)) == 0,
         std::string(target.name) + ": a product of floats differs");
  const Buffer<float> projected(3 * kInputs), taps(kTaps * kInputs), window(kTaps * kInputs), attended(1, 1.0f);
  const Buffer<float> one(kInputs), other(kInputs);
  fill_normal(projected);
  fill_normal(taps);
  fill_normal(window);
  lfm2::GatedConvProblem p = {projected.data(), taps.data(), nullptr, nullptr, attended.data(), nullptr, one.data(),
                              nullptr, nullptr, 1, 1, kInputs, kTaps};
  target.conv.convolve(p, 0, 0, window.data());
  p.out = other.data();
  lfm2::scalar::kConvKernels.convolve(p, 0, 0, window.data());
  expect(std::memcmp(one.data(), other.data(), kInputs * sizeof(float)) == 0,
         std::string(target.name) + ": a convolution differs");
  p.bias = taps.data();
  lfm2::scalar::kConvKernels.convolve(p, 0, 0, window.data());
  p.out = one.data();
  target.conv.convolve(p, 0, 0, window.data());
  expect(std::memcmp(one.data(), other.data(), kInputs * sizeof(float)) == 0,
         std::string(target.name) + ": a convolution with a bias differs");
  attended[0] = 0.5f;
  target.conv.gate(p, 0, 0, one.data());
  lfm2::scalar::kConvKernels.gate(p, 0, 0, other.data());
  expect(std::memcmp(one.data(), other.data(), kInputs * sizeof(float)) == 0,
         std::string(target.name) + ": gated inputs differ");
}

}  // namespace

void test_attention_kernels() {
  for (auto name = lfm2::runnable_targets(); *name != nullptr; ++name) {
    const Target& target = *lfm2::target_by_name(*name);
    worst[0] = worst[1] = 0;
    for (const int64_t dim : {16, 64, 80, 128}) {
      for (const int64_t held : {1, 15, 64, 130}) {
        for (const bool is_int8 : {false, true}) {
          check_attention(target, Head(dim, held, held == 130 ? 16 : 5, is_int8));
          check_origin(target, Head(dim, held, 5, is_int8));
        }
      }
    }
    check_stores(target);
    check_loops(target);
    std::printf("%-40s off by %.1e at most, with int8 by %.1e\n", (std::string("attention ") + *name).c_str(), worst[0],
                worst[1]);
  }
  for (auto name = lfm2::runnable_targets(); *name != nullptr; ++name) {
    for (const bool is_int8 : {false, true}) {
      check_not_a_number(*lfm2::target_by_name(*name), Head(80, 130, 5, is_int8));
    }
  }
}
