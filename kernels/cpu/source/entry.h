// What Python calls: a function a direction, for the KIND and the ACTIVATION that the library is compiled for.
#pragma once

#include <cstring>
#include <exception>

#include "call.h"

#define RESFUSED_API extern "C" __attribute__((visibility("default")))

namespace resfused {

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

}  // namespace resfused
