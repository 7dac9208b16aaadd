// What Python hands over: one record a call, whose fields are those that functions.py packs, in the same order.
#pragma once

#include <cstdint>

namespace resfused {

enum Dtype : int64_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct Tensor {
  char* data;
  int64_t dtype;
  explicit operator bool() const { return data != nullptr; }
};

// Tensors of C elements, each of a dtype of its own, or none.
struct Norm {
  Tensor weight, bias, running_mean, running_var;
  double momentum, eps;
};

// An activation (images, channels, positions): element (n, c, p) lies at (n * positions + p) * channels + c where it
// is channels_last, at (n * channels + c) * positions + p where it is contiguous.
struct Activation {
  int64_t channels_last, images, positions, channels;
  int64_t values() const { return images * positions; }
  int64_t numel() const { return values() * channels; }
};

// What a node ends in, by its place in ACTIVATIONS of Python's; ``negative_slope`` is the leaky ReLU's.
enum Functions : int64_t {
  kIdentity, kRelu, kRelu6, kHardsigmoid, kLeakyRelu, kSilu, kHardswish, kGelu, kGeluTanh, kSigmoid
};
struct Function {
  int64_t name;
  double negative_slope;
};

// The threads to use; bytes of the cache of one core, and of the last one.
struct Machine {
  int64_t threads, core_cache, shared_cache;
};

// Where a forward has its statistics from, kMoments where it does nothing else. They are (mean, rstd[, mean, rstd]), or (mean, M2[, mean, M2]) for kMoments.
enum Statistics : int64_t { kFromBatch, kMoments, kGiven, kRunning };

struct ForwardCall {
  Activation shape;
  Machine machine;
  // Two where the residual has a norm of its own.
  int64_t norms, statistics;
  Tensor x, residual, y;
  uint8_t* mask;
  char* stats;
  Norm norm, residual_norm;
  Function activation;
};

// kAll: sums, then the inputs' gradients. kSums: the first phase of it. kInputs: the second, given the means of the
// sums. kLocal: frozen statistics, with which every gradient of an input is local.
enum Phases : int64_t { kAll, kSums, kInputs, kLocal };

// What was not kept, x or the residual, is none; the results that depend on it are not wanted.
struct BackwardCall {
  Activation shape;
  Machine machine;
  int64_t norms, phases;
  Tensor dy, dy_fork, x, residual, dz, dx, dresidual;
  uint8_t* mask;
  char* stats;
  char* sums;
  Norm norm, residual_norm;
  Tensor dweight, dbias, dresidual_weight, dresidual_bias;
  Function activation;
};

}  // namespace resfused
