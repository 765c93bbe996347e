// Activations, routing, convolutions and state updates, for one instruction set: setup.py compiles it once for each.
#include "cpu/isa_begin.h"
#include "cpu/activate.h"
#include "cpu/causal_conv1d.h"
#include "cpu/delta_rule.h"
#include "cpu/memory.h"
#include "cpu/self_referential.h"
#include "cpu/topk_routing.h"
#include "cpu/tree_routing.h"

#include "cpu/isa_target.h"

#include "cpu/activate_kernel.h"
#include "cpu/causal_conv1d_kernel.h"
#include "cpu/delta_rule_backward_kernel.h"
#include "cpu/delta_rule_step_kernel.h"
#include "cpu/self_referential_kernel.h"
#include "cpu/topk_routing_kernel.h"
#include "cpu/tree_routing_kernel.h"

namespace gossamer::GOSSAMER_ISA {

const RowKernels kRows = {
    .activate = activate_rows,
    .activate_backward = activate_backward_rows,
    .topk_routing = topk_routing,
    .topk_routing_backward = topk_routing_backward,
    .tree_routing = tree_routing,
    .tree_routing_backward = tree_routing_backward,
    .causal_conv1d = causal_conv1d,
    .causal_conv1d_backward = causal_conv1d_backward,
    .causal_conv1d_step = causal_conv1d_step,
    .delta_rule = delta_rule,
    .delta_rule_backward = delta_rule_backward,
    .delta_rule_step = delta_rule_step,
    .gate_backward = gate_backward,
    .self_referential = self_referential,
    .self_referential_backward = self_referential_backward,
};

}  // namespace gossamer::GOSSAMER_ISA

#include "cpu/isa_end.h"
