"""Plans: exchanges and costs against cases worked by hand, sizes against models that transformers builds."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from gossamer.parallel.placement import TableInfo, TablePlan
from gossamer.parallel.planning import layouts, measure, models, rates, tables
from gossamer.parallel.planning.exchanges import Cluster, Group, Link, met_parts, parts
from gossamer.parallel.planning.files import read_object

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
INTRA, INTER = Link(2e-6, 100e9), Link(10e-6, 10e9)
# Sizes at which every kind of weight that a type has differs from every other.
CONFIG = {
    "hidden_size": 96,
    "vocab_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "intermediate_size": 56,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 72,
    "num_experts": 12,
    "num_local_experts": 12,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
    "kv_lora_rank": 28,
    "q_lora_rank": 36,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 24,
}


def mixtral(**changes):
    values = {"model_type": "mixtral", "hidden_size": 4096, "vocab_size": 32000, "num_hidden_layers": 32}
    values |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    values |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    return models.model_of("config.json", values | changes)


def known_rates(value=1e14, memory=1e14):
    rate = rates.Rate(value, "given")
    return layouts.ModelRates(rate, rate, rates.Rate(memory, "given"))


def test_exchanges_take_what_they_do_by_hand():
    cluster = Cluster(8, 4, INTRA, INTER)
    everyone = cluster.group(8)
    assert everyone == Group(8, 4) and everyone.nodes == 2
    near, far = 2e-6 + 1e6 / 100e9, 10e-6 + 1e6 / 10e9
    assert cluster.all_to_all(everyone, 1e6) == pytest.approx(3 * near + 4 * far, rel=1e-12)
    by_node = (10e-6 + 4e6 / 10e9) + 3 * (2e-6 + 2e6 / 100e9)
    assert cluster.all_to_all(everyone, 1e6, node_nbytes=4e6) == pytest.approx(by_node, rel=1e-12)
    gather = 3 * (2e-6 + 2e6 / 100e9) + (10e-6 + 1e6 / 10e9)
    assert cluster.all_gather(everyone, 8e6) == pytest.approx(gather, rel=1e-12)
    assert cluster.reduce_scatter(everyone, 8e6) == cluster.all_gather(everyone, 8e6)
    assert cluster.all_reduce(everyone, 8e6) == pytest.approx(2 * gather, rel=1e-12)
    # Devices four apart are alone on their nodes; devices two apart are in pairs.
    assert cluster.group(2, 4) == Group(2, 1) and cluster.group(4, 2) == Group(4, 2)
    assert cluster.all_to_all(cluster.group(2, 4), 1e6) == pytest.approx(far, rel=1e-12)
    alone = cluster.group(1)
    assert cluster.all_to_all(alone, 1e6) == cluster.all_gather(alone, 1e6) == cluster.all_reduce(alone, 1e6) == 0


def test_by_node_saves_latencies_and_costs_bytes_within_nodes():
    cluster = Cluster(64, 8, INTRA, INTER)
    group = cluster.group(64)
    small = [cluster.all_to_all(group, 64, node_nbytes=w) for w in (None, 8 * 64)]
    assert small[1] < small[0] / 5
    slow = Cluster(64, 8, Link(2e-6, 1e9), INTER)
    large = [slow.all_to_all(group, 1e7, node_nbytes=w) for w in (None, 8e7)]
    assert large[0] < large[1]


def test_exchanges_grow_with_bytes_and_devices():
    for call in ("all_to_all", "all_gather", "reduce_scatter", "all_reduce"):
        times = []
        for devices in (2, 4, 8, 16, 32):
            cluster = Cluster(devices, 8, INTRA, INTER)
            ask = getattr(cluster, call)
            sizes = [ask(cluster.group(devices), nbytes) for nbytes in (0, 1, 1e3, 1e6, 1e9)]
            assert sizes == sorted(sizes) and len(set(sizes)) == 5
            times.append(sizes[3])
        assert times == sorted(times)


@pytest.mark.parametrize(("experts", "ranks", "top_k"), [(4, 2, 2), (5, 2, 3), (8, 3, 2), (6, 6, 1), (4, 2, 4)])
def test_the_chance_to_meet_a_rank_is_that_of_all_choices(experts, ranks, top_k):
    sizes = parts(experts, ranks)
    owner = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    choices = list(itertools.combinations(range(experts), top_k))
    for rank, chance in enumerate(met_parts(sizes, top_k)):
        met = sum(any(owner[expert] == rank for expert in choice) for choice in choices)
        assert chance == pytest.approx(met / len(choices), rel=1e-12)


@pytest.mark.parametrize("name", models.TYPES)
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "with biases"])
def test_sizes_are_those_of_the_model_that_transformers_builds(name, flags):
    transformers = pytest.importorskip("transformers")
    known = transformers.AutoConfig.for_model(name)
    changes = {key: value for key, value in CONFIG.items() if hasattr(known, key)}
    optional = {"attention_bias": flags, "use_qk_norm": flags, "qkv_bias": flags, "tie_word_embeddings": flags}
    changes |= {key: value for key, value in optional.items() if hasattr(known, key)}
    if flags and hasattr(known, "q_lora_rank"):
        changes["q_lora_rank"] = None
    config = transformers.AutoConfig.for_model(name, **changes)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    found = models.model_of("config.json", config.to_dict())
    sizes = {key: parameter.numel() for key, parameter in built.named_parameters()}
    assert found.parameters == sum(sizes.values())
    assert found.expert_total == sum(size for key, size in sizes.items() if ".experts." in key)
    matrices = {
        key: parameter.numel()
        for key, parameter in built.named_parameters()
        if parameter.dim() == 2 and ".experts." not in key and "embed_tokens" not in key
    }
    head = found.vocabulary * found.hidden if found.tied else 0
    assert found.dense_products == sum(matrices.values()) + head
    assert found.expert_products == found.moe_layers * 3 * 3 * found.hidden * found.intermediate


def test_a_published_model_has_its_published_parameters():
    assert mixtral().parameters == 46_702_792_704


def test_one_device_computes_and_sends_nothing():
    model, work = mixtral(), layouts.Workload(1024, 512)
    (cost,) = layouts.plan(model, Cluster(1, 1, INTRA), work, known_rates())
    assert str(cost.layout) == "one device" and cost.sent == {}
    # 32 layers, two experts of three matrices; causal scores over 512 tokens with 32 heads of 128 + 128.
    experts = 6 * 1024 * 32 * 2 * 3 * 4096 * 14336
    attention = 4096 * 128 * (32 + 8 + 8 + 32)
    dense = 6 * 1024 * (32 * (attention + 4096 * 8 + 32 * 256 * 513 / 2) + 32000 * 4096)
    assert cost.seconds["experts"] == pytest.approx(experts / 1e14, rel=1e-12)
    assert cost.seconds["dense"] == pytest.approx(dense / 1e14, rel=1e-12)
    assert cost.seconds["optimizer"] == pytest.approx(46_702_792_704 * 22 / 1e14, rel=1e-12)
    assert cost.memory["parameters"] == cost.memory["gradients"] == 2 * 46_702_792_704
    assert cost.memory["optimizer"] == 8 * 46_702_792_704
    assert cost.memory["logits"] == 1024 * 32000 * 6
    # Norms, queries, keys, values and attention's result, and two experts' pre-activations, of every layer.
    kept = 4 * 4096 + 2 * 32 * 128 + 2 * 8 * 128 + 2 * 2 * 14336
    assert cost.memory["activations"] == 1024 * 32 * 2 * kept


def test_few_tokens_wait_for_weights():
    model, work, cluster = mixtral(), layouts.Workload(1, 1, direction="forward"), Cluster(4, 4, INTRA)
    quick = known_rates(value=1e15)
    costs = [layouts.price(model, cluster, work, quick, layouts.Layout(4, expert=e)) for e in (1, 4)]
    experts = 32 * 8 * 3 * 4096 * 14336
    assert costs[0].seconds["experts"] == pytest.approx(2 * experts / 1e14, rel=1e-12)
    assert costs[1].seconds["experts"] == pytest.approx(2 * experts / 4 / 1e14, rel=1e-12)
    assert costs[0].seconds["dense"] == pytest.approx(2 * model.dense_products / 1e14, rel=1e-12)
    unknown = layouts.ModelRates.of(rates.Rates(RESULTS, "H100"), model, work)
    assert unknown.memory is None
    bare = layouts.price(model, cluster, work, unknown, layouts.Layout(4))
    assert bare.seconds["experts"] == pytest.approx(2 * 32 * 2 * 3 * 4096 * 14336 / unknown.experts.value, rel=1e-12)


def test_parts_of_a_layout_by_hand():
    model, work = mixtral(), layouts.Workload(1024, 512)
    cluster = Cluster(16, 8, INTRA, INTER)

    def price(**layout):
        return layouts.price(model, cluster, work, known_rates(), layouts.Layout(16, **layout))

    expert = 3 * 4096 * 14336
    rest = 46_702_792_704 - 32 * 8 * expert
    split = price(expert=8)
    assert split.memory["parameters"] == 2 * (rest + 32 * expert)
    # A token meets a rank that holds one of 8 experts with probability 1/4, and travels four times a layer.
    rows = 1024 / 4
    # With one expert a rank, a row takes one id and one weight along, and brings back the weight's gradient.
    nbytes = rows * (4 * 4096 * 2 + 8 + 4)
    assert split.sent["rows"] == pytest.approx(32 * 7 * nbytes, rel=1e-12)
    assert split.seconds["rows"] == pytest.approx(32 * 7 * (5 * 2e-6 + (nbytes + 16) / 100e9), rel=1e-12)
    # The rest is summed over 16 devices, each expert over the two that hold it, one on each node.
    dense = cluster.all_reduce(Group(16, 8), 2 * rest / 32) + cluster.all_reduce(Group(2, 1), 2 * expert)
    assert split.seconds["gradients"] == pytest.approx(32 * dense, rel=1e-9)
    sharded = price(expert=8, shard="all")
    assert sharded.memory["parameters"] == pytest.approx(2 * (rest / 16 + 32 * expert / 2), rel=1e-12)
    assert sharded.seconds["optimizer"] == pytest.approx(
        split.seconds["optimizer"] * (rest / 16 + 16 * expert) / (rest + 32 * expert), rel=1e-9
    )
    hybrid = price(shard="node")
    assert hybrid.memory["parameters"] == pytest.approx(2 * 46_702_792_704 / 8, rel=1e-12)
    assert price(shard="all").memory["parameters"] == pytest.approx(2 * 46_702_792_704 / 16, rel=1e-12)
    tensor = price(tensor=4)
    whole = 4096 * (2 * 32 + 1) + 32 * 4096 * 8
    assert tensor.memory["parameters"] == pytest.approx(2 * (whole + (46_702_792_704 - whole) / 4), rel=1e-12)
    # Attention and experts, forward and backward, of every layer, and embedding and head.
    assert tensor.sent["tensor"] == pytest.approx((4 * 32 + 2) * 2 * 4096 * 1024 * 4 * 2 * 3 / 4, rel=1e-12)
    assert "rows" not in tensor.sent


def test_rows_that_travel_are_those_of_a_drawn_routing():
    model = mixtral(num_local_experts=32, num_experts_per_tok=4)
    work = layouts.Workload(4000, 1000, direction="forward")
    layout = layouts.Layout(8, expert=8)
    cost = layouts.price(model, Cluster(8, 8, INTRA), work, known_rates(), layout)
    ids = torch.rand(4000, 32, generator=torch.Generator().manual_seed(0)).topk(4).indices
    pairs = sum(len(set(row) - {0}) for row in (ids // 4).tolist())
    # All-to-alls of every rank alike: here rank 0 sends to the seven others.
    assert cost.sent["rows"] == pytest.approx(32 * pairs * (2 * 4096 * 2 + 4 * 8), rel=0.01)


def test_uneven_parts_are_as_slow_as_the_largest():
    model, work = mixtral(num_local_experts=12), layouts.Workload(1024, 512)
    assert parts(12, 8) == [2, 2, 2, 2, 2, 2, 0, 0]
    even, uneven = (
        layouts.price(model, Cluster(8, 8, INTRA), work, known_rates(), layouts.Layout(8, expert=e)) for e in (4, 8)
    )
    # Two of twelve experts in place of one and a half.
    assert uneven.seconds["experts"] == pytest.approx(even.seconds["experts"] * 2 / 1.5, rel=1e-12)
    busy = layouts.Workload(1024, 512, imbalance=1.5)
    skewed = layouts.price(model, Cluster(8, 8, INTRA), busy, known_rates(), layouts.Layout(8, expert=4))
    assert skewed.seconds["experts"] == pytest.approx(1.5 * even.seconds["experts"], rel=1e-12)
    assert skewed.sent["rows"] == pytest.approx(1.5 * even.sent["rows"], rel=1e-12)
    # In two hops experts are divided evenly.
    nodes = layouts.plan(model, Cluster(8, 4, INTRA, INTER), work, known_rates())
    assert not any(cost.layout.hierarchical for cost in nodes if cost.layout.expert == 8)


def test_tokens_travel_once_to_a_node():
    model, work = mixtral(), layouts.Workload(1024, 512, direction="forward")
    cluster = Cluster(8, 4, INTRA, INTER)
    flat, by_node = (
        layouts.price(model, cluster, work, known_rates(), layouts.Layout(8, expert=8, hierarchical=h))
        for h in (False, True)
    )
    there, back = 4096 * 2 + 8, 4096 * 2
    # Two of eight experts are on the other node for one of them with probability 1 - (4 * 3) / (8 * 7).
    node, device = 1024 * (1 - 12 / 56), 1024 / 4
    assert by_node.sent["rows"] == pytest.approx(32 * (there + back) * (node + 3 * 2 * device), rel=1e-12)
    assert flat.sent["rows"] == pytest.approx(32 * (there + back) * 7 * device, rel=1e-12)
    far = [2 * 10e-6 + (there + back) * rows / 10e9 for rows in (node, 4 * device)]
    assert by_node.seconds["rows"] < flat.seconds["rows"] and far[0] < far[1]


def test_plans_keep_their_order():
    model, work = mixtral(), layouts.Workload(4096, 4096)
    cluster = Cluster(64, 8, INTRA, INTER, memory=80e9)
    costs = layouts.plan(model, cluster, work, known_rates())
    assert {cost.layout.strategy for cost in costs} == set(layouts.STRATEGIES)
    fits = [cost.fits(cluster) for cost in costs]
    assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    steps = [cost.step for cost in costs if cost.fits(cluster)]
    assert steps == sorted(steps)
    assert len({str(cost.layout) for cost in costs}) == len(costs)
    quicker = Cluster(64, 8, INTRA, Link(10e-6, 20e9), memory=80e9)
    by_name = {str(cost.layout): cost for cost in layouts.plan(model, quicker, work, known_rates())}
    assert all(by_name[str(cost.layout)].step <= cost.step for cost in costs)
    held = [layouts.price(model, cluster, work, known_rates(), layouts.Layout(64, expert=e)) for e in (2, 4, 8)]
    sizes = [cost.memory["parameters"] for cost in held]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_growth_goes_from_one_device_to_4096():
    model, work = mixtral(), layouts.Workload(4096, 4096)
    cluster = Cluster(64, 8, INTRA, INTER, memory=80e9)
    grown = layouts.growth(model, cluster, work, known_rates())
    assert [point["devices"] for point in grown if point["strategy"] == "data"] == [2**n for n in range(13)]
    data = [point["step_seconds"] for point in grown if point["strategy"] == "data"]
    assert data == sorted(data)
    expert = {point["devices"]: point for point in grown if point["strategy"] == "expert"}
    best = min(
        (
            c
            for c in layouts.plan(model, cluster, work, known_rates())
            if c.layout.strategy == "expert" and c.fits(cluster)
        ),
        key=lambda cost: cost.step,
    )
    assert expert[64]["step_seconds"] == best.step and expert[64]["fits"]
    assert not any(point["fits"] for point in grown if point["devices"] < 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"c: model_type must be one of mixtral, .*, got 'llama'"),
        ({"hidden_size": None}, "c: hidden_size is missing"),
        ({"hidden_size": 0}, "c: hidden_size must be an integer from 1 to 1048576, got 0"),
        ({"hidden_size": True}, "c: hidden_size must be an integer from 1 to 1048576, got True"),
        ({"hidden_size": 4096.0}, r"c: hidden_size must be an integer from 1 to 1048576, got 4096\.0"),
        ({"num_hidden_layers": 10**9}, "c: num_hidden_layers must be an integer from 1 to 4096, got 1000000000"),
        ({"num_hidden_layers": 10**400}, r"c: num_hidden_layers must be .*, got 1000.*\.\.\."),
        ({"num_experts_per_tok": 9}, "c: num_experts_per_tok must be at most the number of experts, got 9, 8"),
        ({"num_key_value_heads": 3}, "c: num_attention_heads must be a multiple of num_key_value_heads, got 32, 3"),
        ({"num_attention_heads": 4096, "hidden_size": 8}, "c: hidden_size must be at least num_attention_heads, got 8"),
        ({"tie_word_embeddings": "yes"}, "c: tie_word_embeddings must be true or false, got 'yes'"),
        (
            {"model_type": "qwen3_moe", "moe_intermediate_size": 8, "mlp_only_layers": [32]},
            "mlp_only_layers must be an",
        ),
        (
            {"model_type": "qwen3_moe", "moe_intermediate_size": 8, "mlp_only_layers": 3},
            "mlp_only_layers must be a list",
        ),
        (
            {"model_type": "qwen3_moe", "moe_intermediate_size": 8, "decoder_sparse_step": 33},
            "c: at least one layer must have experts",
        ),
    ],
)
def test_wrong_sizes_of_a_model_are_named(changes, message):
    values = {"model_type": "mixtral", "hidden_size": 4096, "vocab_size": 32000, "num_hidden_layers": 32}
    values |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    values |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match=message):
        models.model_of("c", values | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold an object, got list"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (None, "No such file or directory"),
    ],
)
def test_files_that_hold_no_config_are_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        read_object(path)


def test_rates_come_from_the_nearest_stored_run_of_the_device():
    found = rates.Rates(RESULTS, "h100")
    experts = found.get(rates.EXPERTS, dtype="bf16", direction="forward", sizes={"H": 4096, "I": 14336})
    stored = json.loads((RESULTS / "h100-expert-kernels.json").read_text())
    seconds = 0.0
    for kernel in ("up", "down"):
        quoted = stored["quoted"][kernel]["mixtral"]
        times = sorted(next(r for r in stored["runs"] if r["run"] == quoted["run"])["ms"]["mixtral"][quoted["variant"]])
        seconds += 1e-3 * (times[0] + times[-1]) / 2
    t, h, i, _, k = stored["shapes_T_H_I_E_K"]["mixtral"]
    assert experts.value == pytest.approx(6 * t * k * h * i / seconds, rel=1e-9)
    assert experts.source == "h100-expert-kernels.json: expert kernels of mixtral in a row, forward"
    with pytest.raises(ValueError, match=r"--memory-rate must be given in GB/s: no run in .* on 'h100'"):
        found.get(rates.MEMORY, dtype="bf16", direction="both")
    with pytest.raises(ValueError, match=r"--expert-rate must be given in TFLOP/s: .* expert layers in fp32, forward"):
        found.get(rates.EXPERTS, dtype="fp32", direction="forward")
    given = rates.Rates(RESULTS, "h100", {rates.MEMORY: 3e12}).get(rates.MEMORY, dtype="bf16", direction="both")
    assert given == rates.Rate(3e12, "--memory-rate")


def test_processors_are_told_apart_by_their_instructions():
    with pytest.raises(ValueError, match="choose 'AMD EPYC:avx2' or 'AMD EPYC:avx512_bf16'"):
        rates.Rates(RESULTS, "AMD EPYC").get(rates.EXPERTS, dtype="fp32", direction="both")
    stored = json.loads((RESULTS / "moe-cpu-small-epyc-avx2-2-cores.json").read_text())
    (case,) = [c for c in stored["cases"] if (c["dtype"], c["direction"]) == ("fp32", "both")]
    rate = rates.Rates(RESULTS, "AMD EPYC:avx2").get(rates.EXPERTS, dtype="fp32", direction="both")
    assert rate.value == pytest.approx(case["variants"][0]["flops_per_second"])
    assert rate.source.startswith("moe-cpu-small-epyc-avx2-2-cores.json: moe cpu-small fp32")
    tables_of_adam = rates.Rates(RESULTS, "AMD EPYC:avx512_bf16")
    with pytest.raises(ValueError, match=r"--table-rate must be given .* of gossamer adam on"):
        tables.Lookups(1, optimizer="adam").rate(tables_of_adam)
    assert "row-wise Adagrad" in tables.Lookups(1).rate(tables_of_adam).source


def test_results_that_hold_none_are_named(tmp_path):
    where = {"cpu": "Some Processor", "native_isa": "avx2"}
    broken = {"environment": where, "cases": [{"device": "cpu", "family": "moe"}]}
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"broken\.json holds no results that can be read"):
        rates.Rates(tmp_path, "some").get(rates.EXPERTS, dtype="fp32", direction="both")


def table(rows=1000, dim=8, bag=4, name="t"):
    return tables.TableSize(name, rows, dim, bag)


@pytest.mark.parametrize(("rows", "lookups"), [(1, 5), (2, 3), (3, 4)])
def test_distinct_ids_are_those_of_all_draws(rows, lookups):
    draws = [len(set(draw)) for draw in itertools.product(range(rows), repeat=lookups)]
    assert tables.distinct(rows, lookups) == pytest.approx(sum(draws) / len(draws), rel=1e-12)


@pytest.mark.parametrize("name", tables.OPTIMIZERS)
def test_rows_are_stored_with_the_states_that_the_optimizer_makes(name):
    states = tables.OPTIMIZERS[name](lr=0.1).state(6, 8)
    # The count of steps, one number a table, is left out.
    expected = 6 * 8 * 4 + sum(t.nbytes for t in states.values() if t.numel() > 1)
    assert tables.Lookups(1, optimizer=name).stored_bytes(6, 8) == expected


def test_placements_by_hand():
    cluster, work = Cluster(4, 4, INTRA), tables.Lookups(100, optimizer="sgd")
    sizes, rate = [table(bag=1), table(bag=4, name="u")], rates.Rate(1e9, "given")
    by_name = {cost.layout.name: cost for cost in tables.plan(sizes, cluster, work, rate)}
    row, lookups = 8 * 4, 100 * 5
    assert by_name["replicate"].memory["tables"] == 2 * 1000 * row
    assert by_name["replicate"].seconds["lookups"] == pytest.approx(4 * lookups * row / 1e9)
    # An id and the length of a bag take four bytes each.
    assert by_name["replicate"].sent == {"ids": 3 * (lookups + 200) * 4, "gradients": 3 * 2 * 100 * row}
    assert by_name["row"].memory["tables"] == by_name["column"].memory["tables"] == 2 * 1000 * row / 4
    met = tables.distinct(1000, 100) + tables.distinct(1000, 400)
    assert by_name["row"].sent["ids"] == pytest.approx(3 * ((met + lookups) / 4 + 200) * 4)
    assert by_name["row"].sent["rows"] == pytest.approx(3 / 4 * met * row)
    # A bag of one id has a row on a given device with probability 1/4, a bag of four with 1 - (3/4)^4.
    assert by_name["row"].sent["gradients"] == pytest.approx(3 * 100 * row * (1 / 4 + 1 - (3 / 4) ** 4))
    # Of the two tables the second has four times as much to do, for the samples of all four devices.
    assert by_name["table"].seconds["lookups"] == pytest.approx(4 * 400 * row / 1e9)
    assert by_name["table"].memory["tables"] == 1000 * row
    assert by_name["table"].sent == {"ids": 3 * 500 * 4, "rows": 3 * 100 * row, "gradients": 3 * 100 * row}
    assert by_name["column"].sent["ids"] == 3 * (lookups + 200) * 4
    assert by_name["column"].sent["rows"] == 3 * 2 * 100 * 2 * 4
    each = 3 * (2e-6 + 2 * 100 * 2 * 4 / 100e9)
    assert by_name["column"].seconds["rows"] == pytest.approx(each)


@pytest.mark.parametrize("kind", ["row", "column", "replicate"])
def test_tables_send_what_their_own_plan_says(kind):
    world, batch, sizes = 4, 100, table(bag=3)
    unique = tables.distinct(sizes.rows, batch * sizes.bag)
    info = TableInfo(sizes.rows, sizes.dim, 0, lookups=batch * sizes.bag, unique=unique, bags=batch)
    expected = TablePlan(world, {"t": kind}, {}, {"t": info}).sent_nbytes("t")
    placement = tables.Placement(kind, world, (kind,), ("t",))
    cluster, rate = Cluster(world, world, INTRA), rates.Rate(1e9, "given")
    cost = tables.price([sizes], cluster, tables.Lookups(batch, optimizer="sgd"), rate, placement)
    assert sum(cost.sent.values()) == pytest.approx(expected, rel=1e-12)


def test_the_heaviest_table_goes_where_least_is():
    assert tables.place_whole([5.0, 3.0, 3.0, 2.0, 2.0, 1.0], 2) == [0, 1, 1, 0, 1, 0]


def test_mixed_placement_is_no_worse_and_fits_where_it_can():
    # Sixteen devices can divide the columns of every second table only.
    sizes = [table(10**n, 32 if n % 2 else 8, 1 + n, f"t{n}") for n in range(1, 8)]
    work, rate = tables.Lookups(2048), rates.Rate(1e10, "given")
    for limit in (None, 0.5e9):
        cluster = Cluster(16, 8, INTRA, INTER, memory=limit)
        costs = {cost.layout.name: cost for cost in tables.plan(sizes, cluster, work, rate)}
        fitting = [cost.step for cost in costs.values() if cost.fits(cluster)]
        assert costs["mixed"].fits(cluster) and costs["mixed"].step == min(fitting)
        assert len(set(costs["mixed"].layout.where)) > 1


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({}, "t: tables must be a list of 1 to 16384 tables"),
        ({"tables": []}, "t: tables must be a list of 1 to 16384 tables"),
        ({"tables": [3]}, "t: table 0 must be an object, got int"),
        ({"tables": [{"name": "a", "rows": 1, "dim": 1}]}, "t: table 0: bag must be an integer from 1 to"),
        (
            {"tables": [{"name": "a", "rows": 2**41, "dim": 1, "bag": 1}]},
            "t: table 0: rows must be an integer from 1 to",
        ),
        ({"tables": [{"name": "a", "rows": 1, "dim": 1, "bag": 1, "x": 1}]}, "table 0 must hold .*, got x as well"),
        ({"tables": [{"name": "a", "rows": 1, "dim": 1, "bag": 1}] * 2}, "t: table 1: name must be a text that no"),
    ],
)
def test_wrong_tables_are_named(described, message):
    with pytest.raises(ValueError, match=message):
        tables.tables_of("t", described)


def test_a_fit_finds_the_link_that_made_the_times():
    link = Link(7e-6, 3e9)

    def sample(nbytes, error=1.0):
        seconds = error * measure.predict(link, measure.ALL_TO_ALL, nbytes, 4)
        return measure.Sample(measure.ALL_TO_ALL, nbytes, True, seconds, seconds, seconds, 9)

    found = measure.fit([sample(n) for n in measure.FITTED], 4)
    assert found.latency == pytest.approx(7e-6, rel=1e-9) and found.bandwidth == pytest.approx(3e9, rel=1e-9)
    # A few per cent of noise in each time moves the link by a few per cent.
    found = measure.fit([sample(n, 1 + 0.02 * (-1) ** i) for i, n in enumerate(measure.FITTED)], 4)
    assert abs(math.log(found.latency / 7e-6)) < 0.05 and abs(math.log(found.bandwidth / 3e9)) < 0.05
    with pytest.raises(ValueError, match="samples must hold all-to-alls of at least two sizes"):
        measure.fit([sample(1024)], 4)
    flat = [measure.Sample(measure.ALL_TO_ALL, n, True, t, t, t, 9) for n, t in ((1024, 2e-3), (2048, 1e-3))]
    with pytest.raises(ValueError, match="times that grow with the size"):
        measure.fit(flat, 2)


def test_two_hops_are_predicted_as_an_exchange_by_node():
    link = Link(7e-6, 3e9)
    # One message of two processes' bytes to the other node, one of both nodes' bytes within this one.
    assert measure.predict(link, measure.TWO_HOPS, 1000, 4) == pytest.approx(2 * 7e-6 + 4000 / 3e9, rel=1e-12)
    assert measure.predict(link, measure.ALL_TO_ALL, 1000, 4) == pytest.approx(3 * 7e-6 + 3000 / 3e9, rel=1e-12)


def test_bytes_of_rows_are_those_that_processes_sent():
    """Of the stored run of two processes, whose routing was drawn."""
    stored = json.loads((RESULTS / "parallel-experts-fp32-gloo-epyc-2-cores.json").read_text())
    run = stored["runs"][0]
    sizes, processes = run["sizes"], run["processes"]
    changes = {"num_hidden_layers": 1, "hidden_size": sizes["H"], "intermediate_size": sizes["I"]}
    model = mixtral(**changes, num_local_experts=sizes["E"], num_experts_per_tok=sizes["K"])
    for case in run["cases"]:
        work = layouts.Workload(sizes["T"], sizes["T"], dtype=run["dtype"], direction=case["direction"])
        layout = layouts.Layout(processes, expert=processes)
        cost = layouts.price(model, Cluster(processes, processes, INTRA), work, known_rates(), layout)
        assert cost.sent["rows"] == pytest.approx(case["variants"][0]["sent_bytes"], rel=0.01)


def test_links_are_read_back(tmp_path):
    path = tmp_path / "links.json"
    runs = [{"processes": n, "link": {"latency": n * 1e-6, "bandwidth": n * 1e9}} for n in (4, 2)]
    path.write_text(json.dumps({"runs": runs}))
    assert measure.read_link(path) == Link(4e-6, 4e9)
    for wrong, message in (
        ({}, "holds no runs"),
        ({"runs": [{"processes": 2}]}, "a run holds no link"),
        ({"runs": [{"processes": "2"}]}, "processes must be an integer from 2"),
        ({"runs": [{"processes": 2, "link": {"latency": 1, "bandwidth": "x"}}]}, "bandwidth must be a finite number"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            measure.read_link(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link(-1.0, 1.0), "latency must be a finite number of seconds and at least 0, got -1.0"),
        (lambda: Link(0.0, 0.0), "bandwidth must be finite and above 0, got 0.0"),
        (lambda: Cluster(0, 1, INTRA), "devices must be at least 1, got 0"),
        (lambda: Cluster(12, 8, INTRA, INTER), "devices must fill their nodes of 8, got 12"),
        (lambda: Cluster(16, 8, INTRA), "inter must be given for 16 devices on nodes of 8"),
        (lambda: Cluster(1, 1, INTRA, memory=0.0), "memory must be above 0 bytes, got 0.0"),
        (lambda: layouts.Workload(0, 1), "tokens must be at least 1, got 0"),
        (lambda: layouts.Workload(8, 9), "sequence must be from 1 to the 8 tokens of a device, got 9"),
        (lambda: layouts.Workload(1, 1, dtype="int8"), "dtype must be one of fp32, bf16, fp16, got 'int8'"),
        (lambda: layouts.Workload(1, 1, imbalance=0.5), "imbalance must be finite and at least 1, got 0.5"),
        (lambda: tables.Lookups(0), "batch must be at least 1, got 0"),
        (lambda: tables.Lookups(1, optimizer="lion"), "optimizer must be one of sgd, .*, got 'lion'"),
        (lambda: rates.Rates(RESULTS, "x", {rates.DENSE: 0.0}), "--dense-rate must be finite and above 0, got 0"),
    ],
)
def test_wrong_clusters_and_workloads_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
