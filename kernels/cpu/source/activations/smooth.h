// silu, sigmoid and gelu in both forms, and their derivatives: compiled once, not into every loop, which calls them for
// each pack.
#pragma once

#include "../call.h"
#include "../packs/pack.h"

namespace resfused {

Pack<float> smooth(int64_t name, Pack<float> z);
Pack<double> smooth(int64_t name, Pack<double> z);
Pack<float> smooth_slope(int64_t name, Pack<float> z);
Pack<double> smooth_slope(int64_t name, Pack<double> z);

}  // namespace resfused
