"""The cleanup of a translated graph: `onnxscript.optimizer.optimize_ir` without rules that cannot apply to our graphs.

One of its rewrite rules, which joins slices to a Split, looks at the whole graph for every node, so its time grows with the square
of the number of blocks. It took most of the export of a 28-block transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

#: The rules for operators that our graphs translate to, by the operator of the pattern's last node, in the optimizer's order. Those
#: for scatters, Gemm, batch norms, dropout and integer convolutions are left out too.
RULES: Mapping[str, tuple[RewriteRule, ...]] = {
    "Mul": tuple(rules.mul_by_1_rule.commute()),
    "Add": tuple(rules.add_0_rule.commute()),
    "Sub": (rules.sub_0_rule,),
    "Div": (rules.div_by_1_rule,),
    "Reshape": (
        rules.two_reshapes_matmul_reshape_rule,
        rules.one_reshape_matmul_reshape_rule,
        rules.materialize_reshape_shape_rule,
        rules.reshape_reshape_rule,
        rules.squeeze_reshape_1d_rule,
    ),
    "Cast": (
        rules.cast_constant_of_shape_rule,
        rules.cast_constant_of_shape_without_value_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
    ),
    "Slice": (rules.collapse_slice_rule, rules.collapse_slice2_rule),
    "Min": (rules.min_min_rule, rules.max_min_rule),
    "Max": (rules.max_max_rule, rules.min_max_rule),
    "Clip": (rules.successive_clip_relu_rule, rules.successive_clip_rule),
    "Relu": (rules.successive_relu_clip_rule, rules.successive_relu_rule),
    "Expand": (rules.no_op_expand_rule,),
    "Flatten": (rules.flatten_to_reshape_rule,),
    "Transpose": (rules.no_op_transpose_rule, rules.transpose_transpose_rule),
    "Unsqueeze": (rules.unsqueeze_unsqueeze_rule,),
    "Conv": (rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule, rules.remove_optional_bias_from_conv_rule),
}
#: Rounds of folding and rewriting. What the first one changes may give the second something to do.
_ROUNDS = 2


class _RuleOf:
    """A rewrite rule that looks at nodes of one operator. The rule itself tries to match every node, which takes far longer."""

    def __init__(self, operator: str, rule: RewriteRule) -> None:
        self._operator, self._rule = operator, rule

    def try_rewrite(self, model: onnx_ir.Model, graph: Any, node: onnx_ir.Node, **options: Any) -> Any:
        """As of `RewriteRule`."""
        return self._rule.try_rewrite(model, graph, node, **options) if node.op_type == self._operator else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)


_RULE_SET = RewriteRuleSet([_RuleOf(operator, rule) for operator, of_it in RULES.items() for rule in of_it])  # type: ignore[misc]


def optimize(model: onnx_ir.Model) -> None:
    """Fold constants, apply `RULES` and remove what nothing reads, in place.

    Afterwards every constant is an initializer, equal initializers and equal nodes exist once, and all names are unique.
    """
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        folded = fold_constants_ir(model, onnx_shape_inference=True)
        changed = [folded.modified, RewritePass(_RULE_SET)(model).modified, common.RemoveUnusedNodesPass()(model).modified]
        common.RemoveUnusedFunctionsPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        if not any(changed):
            break
    for last in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        last(model)
