"""The check of a layer against its replacement: right ones pass and are timed, wrong ones fail and are not."""

from __future__ import annotations

import copy
import json
import textwrap

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gossamer
from gossamer.bench.harness import check as checking
from gossamer.bench.harness import check_report, check_target
from gossamer.cli import app
from gossamer.testing import errors


class Eager(nn.Module):
    """An expert layer in plain torch, with the names of gossamer's."""

    def __init__(self, h=16, i=8, e=4, k=2, factor=1.0):
        super().__init__()
        self.k, self.factor = k, factor
        self.router = nn.Linear(h, e, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(e, 2 * i, h) / h**0.5)
        self.down_proj = nn.Parameter(torch.randn(e, h, i) / i**0.5)

    def forward(self, x):
        weights, ids = self.router(x).softmax(1).topk(self.k, dim=1)
        y = torch.zeros_like(x)
        for e in range(self.down_proj.shape[0]):
            token, slot = (ids == e).nonzero(as_tuple=True)
            gate, up = (x[token] @ self.gate_up_proj[e].T).chunk(2, dim=1)
            out = (nn.functional.silu(gate) * up) @ self.down_proj[e].T
            y = y.index_add(0, token, out * weights[token, slot].unsqueeze(1) * self.factor)
        return {"y": y, "ids": ids}


class Fused(Eager):
    """The same layer over our operator."""

    def forward(self, x):
        weights, ids = self.router(x).softmax(1).topk(self.k, dim=1)
        routing = gossamer.dispatch(ids, self.down_proj.shape[0])
        y = gossamer.expert_mlp(x, self.gate_up_proj, self.down_proj, routing, weights)
        return {"y": y * self.factor, "ids": ids}


class Detached(Fused):
    """A layer whose output is right, but which gives one weight no gradient."""

    def forward(self, x):
        self.down_proj.requires_grad_(True)
        weights, ids = self.router(x).softmax(1).topk(self.k, dim=1)
        routing = gossamer.dispatch(ids, self.down_proj.shape[0])
        y = gossamer.expert_mlp(x, self.gate_up_proj, self.down_proj.detach(), routing, weights)
        return {"y": y, "ids": ids}


def converted(kind, **options):
    """A replacement that takes the original's weights."""

    def convert(module):
        made = kind(**options)
        made.load_state_dict(module.state_dict())
        return made.to(next(module.parameters()))

    return convert


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(checking, "TIMING_BUDGET", 0.01)


@pytest.fixture
def original(device):
    return Eager().to(device)


@pytest.fixture
def x(device):
    return torch.randn(24, 16, device=device)


def test_a_machine_that_is_not_idle_is_named_beside_the_speeds(original, x, monkeypatch):
    """Two of three samples take twice as long as the shortest, or all take as long."""
    for slow, noted in ((2.0, True), (1.0, False)):
        samples = [1e-3, slow * 1e-3, slow * 1e-3] * 10
        monkeypatch.setattr(checking, "samples_of", lambda runs, *_, found=samples: dict.fromkeys(runs, found))
        report = gossamer.check(original, converted(Fused), x)
        assert [speed.slowing for speed in report.speed] == [slow - 1] * 2
        note = "Calls took 100.0% longer in the median than in their shortest samples: the machine was not idle"
        assert (note in " ".join(str(report).split())) == noted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_replacement_passes_and_is_timed(device, dtype):
    if device == "cpu" and dtype == torch.bfloat16 and gossamer._backend.native_unavailable():
        pytest.skip("no native kernels")
    module = Eager().to(device, dtype)
    report = gossamer.check(module, converted(Fused), torch.randn(24, 16, device=device, dtype=dtype))
    assert report.ok and report.deterministic, report
    kinds = [(row.kind, row.name) for row in report.rows]
    parameters = ["gate_up_proj", "down_proj", "router.weight"]
    assert kinds == [
        ("result", "y"),
        ("result", "ids"),
        ("input gradient", "0"),
        *(("parameter gradient", name) for name in parameters),
    ]
    assert [s.direction for s in report.speed] == ["forward", "forward+backward"]
    assert all(s.original > 0 and s.replacement > 0 for s in report.speed)
    assert all(p.grad is None for p in module.parameters())
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_errors_are_those_against_float64(original, x):
    report = gossamer.check(original, converted(Fused), x, speed=False)
    truth = copy.deepcopy(original).double()(x.double())["y"]
    row = next(row for row in report.rows if row.name == "y")
    assert (row.error, row.worst) == errors(converted(Fused)(original)(x)["y"], truth)
    assert row.original_error == pytest.approx(errors(original(x)["y"], truth)[0], rel=1) and row.original_error > 0
    assert report.speed == ()


def test_a_wrong_replacement_fails_and_is_not_timed(original, x):
    report = gossamer.check(original, converted(Fused, factor=1.01), x)
    assert not report.ok and report.speed == ()
    wrong = {row.name for row in report.rows if not row.ok}
    assert wrong == {"y", "0", "gate_up_proj", "down_proj", "router.weight"}
    row = next(row for row in report.rows if row.name == "y")
    assert row.error == pytest.approx(0.01, rel=0.01) and "RMS error above" in row.message
    shown = str(report)
    assert "WRONG in 5 of 6 tensors; it was not timed" in shown and "speed" not in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_a_wrong_gradient_alone_fails(original, x):
    report = gossamer.check(original, converted(Detached), x)
    assert [row.name for row in report.rows if not row.ok] == ["down_proj"]
    assert "only the original has it" in str(report)
    assert gossamer.check(original, converted(Detached), x, backward=False).ok


def test_other_integers_and_shapes_fail(original, x):
    class Other(Fused):
        def forward(self, x):
            found = super().forward(x)
            return {"y": found["y"][1:], "ids": found["ids"].flip(1)}

    report = gossamer.check(original, converted(Other), x, backward=False)
    messages = {row.name: row.message for row in report.rows}
    assert messages == {
        "y": "torch.float32 (23, 16), expected torch.float32 (24, 16)",
        "ids": "48 of 48 values differ",
    }


def test_a_replacement_that_does_not_repeat_itself_fails(original, x):
    class Noisy(Fused):
        calls = 0

        def forward(self, x):
            Noisy.calls += 1
            found = super().forward(x)
            return found | {"y": found["y"] * (1 + 2.0**-23 * (Noisy.calls % 2))}

    report = gossamer.check(original, converted(Noisy), x, backward=False)
    assert not report.deterministic and report.original_deterministic and not report.ok
    assert "does not repeat its bits" in str(report)


def test_nan_is_wrong_whoever_gives_it(original, x):
    class NotANumber(Fused):
        def forward(self, x):
            return {key: v * float("nan") if key == "y" else v for key, v in super().forward(x).items()}

    assert not gossamer.check(original, converted(NotANumber), x, backward=False).ok
    report = gossamer.check(original, converted(Fused), x * float("inf"), backward=False)
    assert not report.ok and "the original itself is not finite" in str(report)


def test_weights_stored_otherwise_are_named_and_not_compared(original, x):
    class Renamed(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner(x)

    report = gossamer.check(original, Renamed, x, speed=False)
    assert report.ok
    assert report.not_compared[0] == "down_proj" and len(report.not_compared) == 6
    assert "not compared, since only one of the two has them: down_proj" in str(report)


def test_many_parameters_are_summed_up_and_wrong_ones_always_shown():
    rows = [checking.CheckRow(f"p{i}", "parameter gradient", 1e-3 * i, 0.0, 1.0, 1.0) for i in range(40)]
    rows[3] = checking.CheckRow("p3", "parameter gradient", 9.0, 9.0, 1.0, 1.0, "too large")
    report = checking.CheckReport("title", tuple(rows), (), True, True, ())
    shown = check_report.text(report)
    assert "p3 " in shown and "p39 " in shown and "p5 " not in shown
    assert f"and {40 - 1 - check_report.MOST_PARAMETERS} more parameters whose gradients are right" in shown


def test_a_hugging_face_model_is_replaced_by_gossamer(device):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(device).eval()
    implementation = model.config._experts_implementation
    ids = torch.randint(64, (2, 12), device=device)
    report = gossamer.check(model, None, ids, kwargs={"use_cache": False})
    assert report.ok, report
    assert model.config._experts_implementation == implementation, "the original was changed"
    names = {row.name for row in report.rows}
    assert "logits" in names and any("experts.gate_up_proj" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_function_of_no_argument_builds_a_module_that_takes_the_weights(original, x, dtype):
    """In the original's dtype and mode, on its device."""
    original.to(dtype).eval()
    made = []

    def build(options=None):
        made.append(Eager())
        return made[-1]

    report = gossamer.check(original, build, x.to(dtype), speed=False)
    assert report.ok, report
    (module,) = made
    assert not module.training
    for name, value in original.state_dict().items():
        assert torch.equal(module.state_dict()[name], value) and module.state_dict()[name].dtype == dtype, name
    with pytest.raises(ValueError, match=r"replacement does not take the original's weights \(.*one argument"):
        gossamer.check(original, lambda: nn.Linear(2, 3), x.to(dtype))


def test_bad_arguments_are_explained():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got function"):
        gossamer.check(errors)
    with pytest.raises(TypeError, match=r"replacement must be a torch.nn.Module, a function .* got int"):
        gossamer.check(nn.Linear(2, 2), 3)
    with pytest.raises(TypeError, match=r"replacement must return a torch\.nn\.Module, got int"):
        gossamer.check(nn.Linear(2, 2), lambda module: 3)


USER_CODE = """
    import torch
    from torch import nn

    class Scaled(nn.Module):
        def __init__(self, factor=2.0):
            super().__init__()
            self.linear = nn.Linear(6, 5)
            self.factor = factor

        def forward(self, x, scale=1.0):
            return self.linear(x) * self.factor * scale

    instance = Scaled()
    number = 3

    def right():
        return Scaled()

    def wrong():
        return Scaled(2.02)

    def convert(module):
        module.linear = nn.Sequential(module.linear)
        return module

    def other_weights():
        return nn.Linear(6, 5)

    def fails():
        raise RuntimeError("out of cheese")
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder with a user's module in it, which is the current one."""
    (tmp_path / "userlayers.py").write_text(textwrap.dedent(USER_CODE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "userlayers", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["check", *arguments], catch_exceptions=False)


LAYER = ("userlayers:Scaled", "--input", "3,6")


def test_the_command_passes_a_right_layer_and_fails_a_wrong_one(user):
    good = invoke(*LAYER, "--replacement", "userlayers:right", "--json", "found.json")
    assert good.exit_code == 0, good.output
    assert "Scaled and its replacement on " in good.stdout and "forward+backward" in good.stdout
    assert max(map(len, good.stdout.splitlines())) <= 100
    assert json.loads((user / "found.json").read_text())["speed"]
    bad = invoke(*LAYER, "--replacement", "userlayers:wrong")
    assert bad.exit_code == 1
    assert "WRONG" in bad.stdout and "ms (median)" not in bad.stdout
    by_function = invoke(
        "userlayers:instance", "--input", "3,6:fp32", "--replacement", "userlayers:convert", "--no-speed"
    )
    assert by_function.exit_code == 0 and "ms (median)" not in by_function.stdout


def test_inputs_come_from_a_safetensors_file(user):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"0": torch.randn(2, 6), "scale": torch.tensor(3.0)}, user / "in.safetensors")
    found = invoke("userlayers:Scaled", "--inputs", "in.safetensors", "--replacement", "userlayers:right", "--no-speed")
    assert found.exit_code == 0, found.output
    assert any(line.startswith("scale ") for line in found.stdout.splitlines())


def test_a_hugging_face_name_is_built_small(user, monkeypatch):
    pytest.importorskip("transformers", minversion="5")
    small = ["vocab_size=64", "hidden_size=32", "moe_intermediate_size=16", "num_experts=4", "num_experts_per_tok=2"]
    small += ["num_hidden_layers=1", "num_attention_heads=2", "num_key_value_heads=2", "head_dim=16"]
    options = [word for setting in small for word in ("--set", setting)]
    found = invoke("qwen3_moe", *options, "--direction", "forward", "--no-speed")
    assert found.exit_code == 0, found.output
    assert "Qwen3MoeForCausalLM and its replacement" in found.stdout
    monkeypatch.setattr(check_target, "_free_bytes", lambda device: 1000.0)
    huge = invoke("Qwen3MoeConfig", *options)
    assert huge.exit_code == 2 and "billion parameters" in huge.stderr and huge.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["mixtral", "--set", "num_expert=4"],
            "--set num_expert: MixtralConfig has no such setting; close names: num_exp",
        ),
        (["MixtralForCausalLM", "--set", "nope=1"], "--set nope: MixtralConfig has no such setting"),
        (["qwen3_moe", "--set", "num_experts=4"], "num_experts_per_tok (8) is larger than num_experts (4)"),
        (["mixtral", "--set", "num_attention_heads=0"], "the original model cannot be built with these settings: "),
    ],
)
def test_settings_that_a_config_does_not_have_are_refused(user, arguments, message):
    pytest.importorskip("transformers", minversion="5")
    result = invoke(*arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:Layer", "--input", "1"], "MODULE nowhere:Layer: importing nowhere raised ModuleNotFoundError"),
        (["userlayers:Nothing", "--input", "1"], "MODULE userlayers:Nothing: userlayers has no attribute 'Nothing'"),
        (["userlayers:number", "--input", "1"], "MODULE userlayers:number must be a torch.nn.Module or build one"),
        (["userlayers:fails", "--input", "1"], "calling it raised RuntimeError: out of cheese"),
        (["userlayers:Scaled"], "give the layer's inputs"),
        (["userlayers:Scaled", "--input", "3x6"], "--input must be SHAPE[:DTYPE[:LIMIT]]"),
        (["userlayers:Scaled", "--input", "3,6:fp8"], "--input: the dtype must be one of"),
        (["userlayers:Scaled", "--input", "3,6:int64"], "--input: integers need a limit that they stay below"),
        (["userlayers:Scaled", "--inputs", "missing.safetensors"], "--inputs missing.safetensors"),
        ([*LAYER, "--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16"),
        ([*LAYER, "--replacement", "userlayers:other_weights"], "does not take the original's weights"),
        ([*LAYER, "--json", "no/folder.json"], "--json"),
        ([*LAYER], "ValueError: model must hold experts modules"),
        (
            ["userlayers:Scaled", "--input", "3,7", "--replacement", "userlayers:right"],
            "The original itself failed with these inputs and settings: RuntimeError: ",
        ),
        *([] if torch.cuda.is_available() else [([*LAYER, "--device", "cuda"], "--device cuda: torch finds no CUDA")]),
    ],
)
def test_bad_options_are_one_line_and_no_traceback(user, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("gossamer check: "))
    assert message in line
    assert "Traceback" not in result.output
