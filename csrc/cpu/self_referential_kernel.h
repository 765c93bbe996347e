// The recurrence of self-referential weight matrices for one instruction set.
#pragma once

#include "cpu/activation_kernel.h"
#include "cpu/memory.h"
#include "cpu/panel.h"
#include "cpu/self_referential.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// One head's matrix, rows padded with zeros to whole vectors, so that every loop along the columns is of whole vectors.
template <class S>
struct PaddedMatrix {
  S* base;
  int64_t rows, columns, stride;

  static int64_t padded(int64_t columns) { return (columns + kLanes<S> - 1) / kLanes<S> * kLanes<S>; }

  S* row(int64_t i) const { return base + i * stride; }

  // Loads dense rows and adds those of `more` unless it is null.
  void load_rows(const S* from, const S* more) const {
    for (int64_t i = 0; i < rows; ++i) {
      S* to = row(i);
      for (int64_t v = 0; v < columns; ++v) to[v] = from[i * columns + v] + (more ? more[i * columns + v] : S(0));
      std::fill(to + columns, to + stride, S(0));
    }
  }

  // Stores dense rows, minus those of `base_rows` unless it is null.
  void store_rows(S* to, const S* base_rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t v = 0; v < columns; ++v) {
        to[i * columns + v] = row(i)[v] - (base_rows ? base_rows[i * columns + v] : S(0));
      }
    }
  }

  // out[v] = Σ_i u[i] · row i[v], four vectors of columns at a time: their sums stay in registers.
  void sum_rows(const S* u, S* out) const {
    int64_t v = 0;
    for (; v + 4 * kLanes<S> <= stride; v += 4 * kLanes<S>) sum_columns<4>(u, v, out);
    for (; v < stride; v += kLanes<S>) sum_columns<1>(u, v, out);
  }

  // out[i] = Σ_v row i[v] · b[v].
  void dot_rows(const S* b, S* out) const {
    for (int64_t i = 0; i < rows; ++i) {
      Vec<S> sum[2] = {};
      const S* from = row(i);
      int64_t v = 0;
      for (; v + 2 * kLanes<S> <= stride; v += 2 * kLanes<S>) {
        sum[0] = fma(load(from + v), load(b + v), sum[0]);
        sum[1] = fma(load(from + v + kLanes<S>), load(b + v + kLanes<S>), sum[1]);
      }
      if (v < stride) sum[0] = fma(load(from + v), load(b + v), sum[0]);
      out[i] = sum_lanes<S>(sum[0] + sum[1]);
    }
  }

  // row i += a[i] · b.
  void add_outer(const S* a, const S* b) const {
    for (int64_t i = 0; i < rows; ++i) {
      S* to = row(i);
      const Vec<S> factor = splat(a[i]);
      for (int64_t v = 0; v < stride; v += kLanes<S>) store(to + v, fma(factor, load(b + v), load(to + v)));
    }
  }

 private:
  template <int Vecs>
  __attribute__((always_inline)) void sum_columns(const S* u, int64_t v, S* out) const {
    Vec<S> sum[Vecs] = {};
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<S> factor = splat(u[i]);
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) sum[j] = fma(factor, load(row(i) + v + j * kLanes<S>), sum[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) store(out + v + j * kLanes<S>, sum[j]);
  }
};

// out = softmax(z) of `count` values; both have room for whole vectors.
template <class S>
void softmax_row(const S* z, int64_t count, S* out) {
  S most = z[0];
  for (int64_t i = 1; i < count; ++i) most = std::max(most, z[i]);
  S sum = 0;
  for (int64_t i = 0; i < count; i += kLanes<S>) {
    const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, count - i));
    store(out + i, vexp(load_valid(z + i, valid) - most));
    for (int j = 0; j < valid; ++j) sum += out[i + j];
  }
  for (int64_t i = 0; i < count; ++i) out[i] /= sum;
}

// dz = p ⊙ (dp − <p, dp>), the gradient through a softmax with result p.
template <class S>
void softmax_gradient(const S* p, const S* dp, int64_t count, S* dz) {
  S dot = 0;
  for (int64_t i = 0; i < count; ++i) dot += p[i] * dp[i];
  for (int64_t i = 0; i < count; ++i) dz[i] = p[i] * (dp[i] - dot);
}

// A thread's memory for one head.
template <class S>
struct SelfReferentialMemory {
  int64_t size, columns, stride, side;
  PaddedMatrix<S> w, gradient;
  S *z, *q, *k, *difference, *delta, *change, *rates, *ddelta, *dz, *dq, *dk;

  SelfReferentialMemory(Arena& arena, int64_t d, bool backward)
      : size(d), columns(3 * d + 4), stride(PaddedMatrix<S>::padded(columns)), side(PaddedMatrix<S>::padded(d)) {
    const auto row = [&] { return arena.take<S>(stride); };
    const auto short_row = [&] { return arena.take<S>(side); };
    w = {arena.take<S>(size * stride), size, columns, stride};
    z = row(), delta = row(), change = row(), rates = row();
    q = short_row(), k = short_row(), difference = short_row();
    if (!backward) return;
    gradient = {arena.take<S>(size * stride), size, columns, stride};
    ddelta = row(), dz = row();
    dq = short_row(), dk = short_row();
  }

  // The rate of each column, from those of its block; the padding's is zero.
  void spread(const S* beta) const {
    for (int j = 0; j < 4; ++j) std::fill(rates + j * size, j < 3 ? rates + (j + 1) * size : rates + columns, beta[j]);
    std::fill(rates + columns, rates + stride, S(0));
  }

  void multiply(const S* a, const S* b, S* out) const {
    for (int64_t v = 0; v < stride; v += kLanes<S>) store(out + v, load(a + v) * load(b + v));
  }
};

template <class S, class F>
void each_self_referential_head(const SelfReferentialArgs& args, int64_t begin, int64_t end, bool backward, F&& f) {
  Arena plan;
  SelfReferentialMemory<S>(plan, args.size, backward);
  const Scratch scratch = allocate_scratch(plan.used());
  std::memset(scratch.get(), 0, plan.used());
  Arena arena(scratch.get());
  const SelfReferentialMemory<S> memory(arena, args.size, backward);
  for (int64_t problem = begin; problem < end; ++problem) f(memory, problem);
}

template <class S>
void self_referential_typed(const SelfReferentialArgs& args, int64_t begin, int64_t end) {
  const int64_t d = args.size, columns = args.columns(), matrix = d * columns;
  const auto at = [](const auto* base, int64_t offset) { return static_cast<const S*>(base) + offset; };
  const auto to = [](void* base, int64_t offset) { return static_cast<S*>(base) + offset; };
  each_self_referential_head<S>(args, begin, end, false, [&](const SelfReferentialMemory<S>& m, int64_t problem) {
    const int64_t batch = problem / args.heads, head = problem % args.heads;
    const S* start = at(args.weight, head * matrix);
    m.w.load_rows(start, args.shift ? at(args.shift, problem * matrix) : nullptr);
    for (int64_t t = 0; t < args.tokens; ++t) {
      const int64_t place = ((batch * args.tokens + t) * args.heads + head) * d;
      m.w.sum_rows(at(args.x, place), m.z);
      std::copy_n(m.z, d, to(args.y, place));
      softmax_row(m.z + d, d, m.q);
      softmax_row(m.z + 2 * d, d, m.k);
      S beta[4];
      for (int j = 0; j < 4; ++j) beta[j] = S(1) / (S(1) + std::exp(-m.z[3 * d + j]));
      for (int64_t i = 0; i < d; ++i) m.difference[i] = m.q[i] - m.k[i];
      m.w.sum_rows(m.difference, m.delta);
      m.spread(beta);
      m.multiply(m.rates, m.delta, m.change);
      m.w.add_outer(m.k, m.change);
      if (args.steps) {
        S* step = to(args.steps, (problem * args.tokens + t) * args.step_size());
        step = std::copy_n(m.q, d, step);
        step = std::copy_n(m.k, d, step);
        step = std::copy_n(beta, 4, step);
        std::copy_n(m.delta, columns, step);
      }
      if (args.kept && (t + 1 == args.tokens || (t + 1) % args.segment == 0)) {
        m.w.store_rows(to(args.kept, (problem * args.segments() + t / args.segment) * matrix), nullptr);
      }
    }
    if (args.final_shift) m.w.store_rows(to(args.final_shift, problem * matrix), start);
  });
}

template <class S>
void self_referential_backward_typed(const SelfReferentialBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t d = args.size, columns = args.columns(), matrix = d * columns;
  const auto at = [](const auto* base, int64_t offset) { return static_cast<const S*>(base) + offset; };
  const auto to = [](void* base, int64_t offset) { return static_cast<S*>(base) + offset; };
  each_self_referential_head<S>(args, begin, end, true, [&](const SelfReferentialMemory<S>& m, int64_t problem) {
    const int64_t batch = problem / args.heads, head = problem % args.heads;
    if (args.dfinal_shift) {
      m.gradient.load_rows(at(args.dfinal_shift, problem * matrix), nullptr);
    } else {
      std::fill_n(m.gradient.base, d * m.stride, S(0));
    }
    for (int64_t segment = args.segments(); segment-- > 0;) {
      // Steps are undone starting from a saved matrix, so rounding accumulates over at most one segment.
      m.w.load_rows(at(args.kept, (problem * args.segments() + segment) * matrix), nullptr);
      const int64_t first = segment * args.segment, last = std::min(args.tokens, first + args.segment);
      for (int64_t t = last; t-- > first;) {
        const int64_t place = ((batch * args.tokens + t) * args.heads + head) * d;
        const S *x = at(args.x, place), *dy = at(args.dy, place);
        const S* q = at(args.steps, (problem * args.tokens + t) * args.step_size());
        const S *k = q + d, *beta = k + d;
        std::copy_n(beta + 4, columns, m.delta);
        m.spread(beta);
        m.multiply(m.rates, m.delta, m.change);
        for (int64_t i = 0; i < d; ++i) m.k[i] = -k[i], m.difference[i] = q[i] - k[i];
        m.w.add_outer(m.k, m.change);
        // The gradient of the change, g = rates ⊙ Δ, of the rates, and of Δ.
        m.gradient.dot_rows(m.change, m.dk);
        m.gradient.sum_rows(k, m.z);
        S dbeta[4] = {};
        for (int j = 0; j < 4; ++j) {
          for (int64_t v = j * d, end_of = j < 3 ? (j + 1) * d : columns; v < end_of; ++v) dbeta[j] += m.z[v] * m.delta[v];
        }
        m.multiply(m.rates, m.z, m.ddelta);
        m.w.dot_rows(m.ddelta, m.dq);
        for (int64_t i = 0; i < d; ++i) m.dk[i] -= m.dq[i];
        std::copy_n(dy, d, m.dz);
        softmax_gradient(q, m.dq, d, m.dz + d);
        softmax_gradient(k, m.dk, d, m.dz + 2 * d);
        for (int j = 0; j < 4; ++j) m.dz[3 * d + j] = beta[j] * (S(1) - beta[j]) * dbeta[j];
        m.w.dot_rows(m.dz, to(args.dx, place));
        m.gradient.add_outer(m.difference, m.ddelta);
        m.gradient.add_outer(x, m.dz);
      }
    }
    m.gradient.store_rows(to(args.dstart, problem * matrix), nullptr);
  });
}

void self_referential(const SelfReferentialArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kFloat64) return self_referential_typed<double>(args, begin, end);
  self_referential_typed<float>(args, begin, end);
}

void self_referential_backward(const SelfReferentialBackwardArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kFloat64) return self_referential_backward_typed<double>(args, begin, end);
  self_referential_backward_typed<float>(args, begin, end);
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
