// One function a direction and a kind, each compiled on its own.
#pragma once

#include "call.h"
#include "storage.h"

namespace resfused {

template <class Kind>
void forward(const ForwardCall& call);
template <class Kind>
void backward(const BackwardCall& call);

}  // namespace resfused
