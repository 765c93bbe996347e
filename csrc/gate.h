// The gate functions of an expert layer, with the numbers that every kernel uses; Python and the bindings use names.
#pragma once

namespace gossamer {

enum Gate : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kClampedSilu };

}  // namespace gossamer
