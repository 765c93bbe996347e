// The functions of the gate of an expert layer, as every kernel numbers them; Python and the bindings name them.
#pragma once

namespace gossamer {

enum Gate : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kClampedSilu };

}  // namespace gossamer
