"""The table of rules that the fused optimizers and the kernel families share."""

import ast
import importlib
from pathlib import Path

import pytest
import torch

import gossamer
from gossamer import optim
from gossamer._step_rules import DECAYS, RULES, StepRule
from gossamer.ops._step_reference import FORMULAS

OPTIMIZERS = [
    value(0.1)
    for value in vars(optim).values()
    if isinstance(value, type) and issubclass(value, optim.Optimizer) and value is not optim.Optimizer
]


def test_each_rule_has_an_optimizer():
    assert {optimizer.rule for optimizer in OPTIMIZERS} == set(RULES)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
def test_optimizers_give_the_numbers_of_their_rules(optimizer):
    """They give exactly the rule's numbers, and have the rule's states in its order."""
    rule = optimizer.step_rule()
    assert set(optimizer._numbers()) == set(RULES[optimizer.rule].numbers) <= set(StepRule._fields)
    assert rule.name == optimizer.rule and rule.decay in DECAYS
    kinds = [*RULES[optimizer.rule].states.values(), None, None]
    assert rule.row_states == (kinds[0] == "row", kinds[1] == "row")
    assert list(optimizer.state_kinds().items()) in ([], list(RULES[optimizer.rule].states.items()))
    assert optim.SGD(0.1, momentum=0.5).state_kinds() == RULES["sgd"].states


def test_codes_of_checkpoints_stay():
    """Checkpoints store the codes, so none may change."""
    names = ["sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb", "ftrl"]
    assert list(RULES)[: len(names)] == names
    assert optim.FTRL(0.1).algorithm == 6 and optim.AdamW().algorithm == optim.Adam().algorithm == 3


def test_each_family_has_each_formula():
    """By the names of the table; the native kernels refuse others."""
    assert set(FORMULAS) == set(RULES)
    native = pytest.importorskip("gossamer._C")
    for name in RULES:
        for decay in DECAYS:
            native.StepRule(**StepRule(name, decay=decay)._asdict())
    with pytest.raises(ValueError, match="optimizer has no native formula: nadam"):
        native.StepRule(**StepRule("nadam")._asdict())
    with pytest.raises(ValueError, match="decay has no native formula: cosine"):
        native.StepRule(**StepRule("sgd", decay="cosine")._asdict())
    # The kernel's last branch, without a condition, is Adam's.
    folder = Path(importlib.import_module("gossamer.triton_kernels").__file__).parent
    words = {
        node.value
        for node in ast.walk(ast.parse((folder / "sparse_update_rules.py").read_text()))
        if isinstance(node, ast.Constant)
    }
    assert set(RULES) - {"adam"} <= words


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optim.SGD(0.1, seed=1.5), TypeError, "seed must be an int, got float"),
        (lambda: optim.SGD(0.1, seed=True), TypeError, "seed must be an int, got bool"),
        (lambda: optim.SGD(0.1, seed=-1), ValueError, r"seed must be in \[0, 2\*\*63\), got -1"),
        (lambda: optim.SGD("fast"), TypeError, "lr must be a number or a floating tensor of one element, got str"),
        (lambda: optim.SGD(True), TypeError, "lr must be a number or a floating tensor of one element, got bool"),
        (lambda: optim.SGD(0.1, momentum="0.9"), TypeError, "momentum must be a number, got str"),
        (lambda: optim.SGD(0.1, momentum=0.9, nesterov=1), TypeError, "nesterov must be a bool, got int"),
        (lambda: optim.Adam(betas=0.9), TypeError, "betas must be two numbers, got 0.9"),
        (lambda: optim.Adam(betas=(0.9, None)), TypeError, r"betas\[1\] must be a number, got NoneType"),
        (lambda: optim.Adam(eps=None), TypeError, "eps must be a number, got NoneType"),
        (lambda: optim.Adam(weight_decay="a"), TypeError, "weight_decay must be a number, got str"),
        (lambda: optim.Adam(clip_norm="a"), TypeError, "clip_norm must be a number, got str"),
        (lambda: optim.Adam(stochastic_rounding="no"), TypeError, "stochastic_rounding must be a bool, got str"),
        (lambda: optim.RowwiseAdagrad(0.1, decoupled=2), TypeError, "decoupled must be a bool, got int"),
        (lambda: optim.Adam(lr=float("nan")), ValueError, "lr must be in"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_rules_are_fixed_when_an_optimizer_is_made():
    """Numbers of any kind become what kernels take; a tensor's rate is left to it."""
    rule = optim.Adam(lr=torch.tensor(0.5), betas=[0, 0.5], weight_decay=1, clip_value=2).step_rule()
    assert rule == StepRule("adam", weight_decay=1.0, beta2=0.5, eps=1e-8, clip_value=2.0)
    assert all(isinstance(value, (str, bool, float)) for value in rule[:-1])
    assert gossamer.optim.AdamW(0.25).step_rule().decay == "weights"
