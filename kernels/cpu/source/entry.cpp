// What Python calls: picks what was compiled for the dtypes of a call.

#include <cstring>
#include <exception>
#include <initializer_list>

#include "entry.h"

namespace resfused {
namespace {

// The dtype of all that are given; kMixed where they have several, kWide with a float64 among them.
constexpr int64_t kMixed = -1, kWide = -2;
int64_t common_dtype(std::initializer_list<Tensor> tensors) {
  int64_t common = tensors.begin()->dtype;
  bool wide = false;
  for (const Tensor& t : tensors) {
    if (!t) continue;
    wide = wide || t.dtype == kFloat64;
    if (t.dtype != common) common = kMixed;
  }
  return wide ? kWide : common;
}

// 0, or 1 where there was no memory for the rows of a call.
template <class Call>
int guarded(const void* record, void (*function)(const Call&)) {
  Call call;
  std::memcpy(&call, record, sizeof call);
  try {
    function(call);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace resfused

#define RESFUSED_API extern "C" __attribute__((visibility("default")))

// The sizes of the two records, which must be those that Python packs.
RESFUSED_API int64_t resfused_record_sizes(int64_t* backward) {
  *backward = sizeof(resfused::BackwardCall);
  return sizeof(resfused::ForwardCall);
}

RESFUSED_API int resfused_forward(const void* record) {
  using namespace resfused;
  return guarded<ForwardCall>(record, [](const ForwardCall& c) {
    switch (common_dtype({c.x, c.residual, c.y})) {
      case kFloat32: return forward<Float32Kind>(c);
      case kBFloat16: return forward<BFloat16Kind>(c);
      case kWide: return forward<WideKind>(c);
      default: return forward<MixedKind>(c);
    }
  });
}

RESFUSED_API int resfused_backward(const void* record) {
  using namespace resfused;
  return guarded<BackwardCall>(record, [](const BackwardCall& c) {
    switch (common_dtype({c.dy, c.dy_fork, c.x, c.residual, c.dz, c.dx, c.dresidual})) {
      case kFloat32: return backward<Float32Kind>(c);
      case kBFloat16: return backward<BFloat16Kind>(c);
      case kWide: return backward<WideKind>(c);
      default: return backward<MixedKind>(c);
    }
  });
}
