"""The sizes of a mixture-of-experts language model, read from a transformers ``config.json``.

The counts are those of the model that transformers builds, weight by weight, computed from the sizes alone: nothing is
built and transformers is not needed. A type of model that is not in :data:`TYPES` is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gossamer.parallel.planning.files import integer

# The largest allowed value of each kind of size: far above any model's, and small enough for every product of sizes.
WIDTH, LAYERS, EXPERTS, HEADS, VOCABULARY = 2**20, 2**12, 2**20, 2**12, 2**26


@dataclass(frozen=True)
class Attention:
    """One attention layer.

    Attributes:
        parameters: all of its weights.
        products: weights that a token is multiplied by.
        heads: heads of the queries.
        kv_heads: heads of keys and values.
        key_width: width of one head of queries and keys.
        value_width: width of one head of values.
    """

    parameters: int
    products: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class Model:
    """A mixture-of-experts language model in numbers.

    Attributes:
        model_type: its name in transformers.
        hidden: width of a token.
        vocabulary: rows of the token embedding.
        layers: number of all layers.
        moe_layers: number of layers with experts.
        experts: experts of one such layer.
        top_k: experts that a token meets.
        intermediate: width inside an expert.
        expert_parameters: parameters of one expert.
        router_parameters: parameters of the router of one layer.
        shared_parameters: parameters of the shared expert of one layer, with its gate.
        shared_width: width inside the shared expert; 0 without one.
        dense_parameters: parameters of the feed-forward part of a layer without experts.
        attention: the attention of every layer.
        norm_parameters: parameters of all norms outside attention.
        tied: whether the head is the token embedding.
    """

    model_type: str
    hidden: int
    vocabulary: int
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    intermediate: int
    expert_parameters: int
    router_parameters: int
    shared_parameters: int
    shared_width: int
    dense_parameters: int
    attention: Attention
    norm_parameters: int
    tied: bool

    @property
    def expert_total(self) -> int:
        """Parameters of all experts of all layers."""
        return self.moe_layers * self.experts * self.expert_parameters

    @property
    def dense_total(self) -> int:
        """Parameters of everything else."""
        layer = self.layers * self.attention.parameters
        layer += self.moe_layers * (self.router_parameters + self.shared_parameters)
        layer += (self.layers - self.moe_layers) * self.dense_parameters
        return layer + self.norm_parameters + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Parameters in total."""
        return self.expert_total + self.dense_total

    @property
    def dense_products(self) -> int:
        """Weights outside the experts that each token is multiplied by, including the head but not the embedding."""
        layer = self.layers * self.attention.products
        layer += self.moe_layers * (self.hidden * self.experts + self.shared_parameters)
        layer += (self.layers - self.moe_layers) * self.dense_parameters
        return layer + self.vocabulary * self.hidden

    @property
    def expert_products(self) -> int:
        """Expert weights that each token is multiplied by."""
        return self.moe_layers * self.top_k * 3 * self.hidden * self.intermediate

    def score_products(self, sequence: int) -> float:
        """Multiply-adds of a token with the keys and values before it, on average over a causal sequence."""
        widths = self.attention.key_width + self.attention.value_width
        return self.layers * self.attention.heads * widths * (sequence + 1) / 2


class _Config:
    """Sizes of a config by name, each checked when it is asked for."""

    def __init__(self, where: str, values: dict) -> None:
        self.where, self.values = where, values

    def size(self, *names: str, most: int, least: int = 1, default: int | None = None) -> int:
        """The first of ``names`` that the config holds, else ``default``; an error without a default."""
        for name in names:
            if self.values.get(name) is not None:
                return integer(self.where, name, self.values[name], least, most)
        if default is None:
            raise ValueError(f"{self.where}: {' or '.join(names)} is missing")
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {name} must be true or false, got {str(value)[:60]!r}")
        return value

    def heads(self) -> tuple[int, int, int]:
        """The number of query heads, the number of key and value heads, and the width of a head."""
        hidden = self.size("hidden_size", most=WIDTH)
        heads = self.size("num_attention_heads", most=HEADS)
        kv_heads = self.size("num_key_value_heads", most=HEADS, default=heads)
        if heads % kv_heads:
            raise ValueError(
                f"{self.where}: num_attention_heads must be a multiple of num_key_value_heads, got {heads}, {kv_heads}"
            )
        if hidden < heads:
            raise ValueError(
                f"{self.where}: hidden_size must be at least num_attention_heads, got {hidden} and {heads}"
            )
        # Rounded down if it does not divide, as in transformers.
        return heads, kv_heads, self.size("head_dim", most=WIDTH, default=hidden // heads)


def _attention(config: _Config, *, bias: tuple[bool, bool], norms: Callable[[int, int, int], int]) -> Attention:
    """Grouped-query attention; ``bias`` is for (queries, keys and values; output), ``norms`` counts parameters."""
    hidden = config.size("hidden_size", most=WIDTH)
    heads, kv_heads, width = config.heads()
    products = hidden * width * (2 * heads + 2 * kv_heads)
    biases = bias[0] * width * (heads + 2 * kv_heads) + bias[1] * hidden
    return Attention(products + biases + norms(heads, kv_heads, width), products, heads, kv_heads, width, width)


def _latent_attention(config: _Config) -> Attention:
    """Multi-head latent attention of DeepSeek-V2 and V3."""
    hidden = config.size("hidden_size", most=WIDTH)
    heads, _, _ = config.heads()
    rope = config.size("qk_rope_head_dim", most=WIDTH)
    key = config.size("qk_nope_head_dim", most=WIDTH) + rope
    value = config.size("v_head_dim", most=WIDTH)
    latent = config.size("kv_lora_rank", most=WIDTH)
    bias = config.flag("attention_bias", False)
    products = hidden * (latent + rope) + latent * heads * (key - rope + value) + heads * value * hidden
    others = latent + bias * (latent + rope + hidden)
    if config.values.get("q_lora_rank") is None:
        products += hidden * heads * key
    else:
        rank = config.size("q_lora_rank", most=WIDTH)
        products += hidden * rank + rank * heads * key
        others += rank + bias * rank
    return Attention(products + others, products, heads, heads, key, value)


def _no_norms(heads: int, kv_heads: int, width: int) -> int:
    return 0


def _norm_of_heads(heads: int, kv_heads: int, width: int) -> int:
    return 2 * width


def _norm_of_all_heads(heads: int, kv_heads: int, width: int) -> int:
    return width * (heads + kv_heads)


def _sinks(heads: int, kv_heads: int, width: int) -> int:
    return heads


def _every_layer(config: _Config, layers: int) -> int:
    return layers


def _sparse_steps(config: _Config, layers: int) -> int:
    """Qwen: one layer in every ``decoder_sparse_step``, except those listed."""
    step = config.size("decoder_sparse_step", most=LAYERS, default=1)
    dense = config.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or len(dense) > layers:
        raise ValueError(f"{config.where}: mlp_only_layers must be a list of at most {layers} layers")
    dense = {integer(config.where, "mlp_only_layers", layer, 0, layers - 1) for layer in dense}
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _after_the_first(config: _Config, layers: int) -> int:
    """DeepSeek-V3: all layers but the first few."""
    return layers - min(layers, config.size("first_k_dense_replace", most=LAYERS, least=0))


def _glm_attention(config: _Config) -> Attention:
    norms = _norm_of_heads if config.flag("use_qk_norm", False) else _no_norms
    return _attention(config, bias=(config.flag("attention_bias", False), False), norms=norms)


def _with_bias(norms: Callable[[int, int, int], int], default: bool = False) -> Callable[[_Config], Attention]:
    def build(config: _Config) -> Attention:
        bias = config.flag("attention_bias", default)
        return _attention(config, bias=(bias, bias), norms=norms)

    return build


@dataclass(frozen=True)
class _Type:
    """The ways in which the models of one type differ from other types.

    Attributes:
        attention: reads its attention.
        intermediate: config names of the width inside an expert.
        moe_layers: returns how many of the layers have experts.
        expert_bias: whether experts have biases.
        router_bias: whether the router has a bias that is a parameter.
        shared_gate: whether a gate of one output scales the shared expert.
    """

    attention: Callable[[_Config], Attention]
    intermediate: str = "moe_intermediate_size"
    moe_layers: Callable[[_Config, int], int] = _every_layer
    expert_bias: bool = False
    router_bias: bool = False
    shared_gate: bool = False


TYPES = {
    "mixtral": _Type(lambda config: _attention(config, bias=(False, False), norms=_no_norms), "intermediate_size"),
    "olmoe": _Type(_with_bias(_norm_of_all_heads), "intermediate_size"),
    "qwen2_moe": _Type(
        lambda config: _attention(config, bias=(config.flag("qkv_bias", True), False), norms=_no_norms),
        moe_layers=_sparse_steps,
        shared_gate=True,
    ),
    "qwen3_moe": _Type(_with_bias(_norm_of_heads), moe_layers=_sparse_steps),
    "gpt_oss": _Type(_with_bias(_sinks, True), "intermediate_size", expert_bias=True, router_bias=True),
    "deepseek_v3": _Type(_latent_attention, moe_layers=_after_the_first),
    "glm4_moe": _Type(_glm_attention, moe_layers=_after_the_first),
}


def model_of(where: str, values: dict) -> Model:
    """The model that the values of a config describe.

    Raises:
        ValueError: its type is not in :data:`TYPES`, or a size is missing, is not an integer, is out of range or
            contradicts another; the message names ``where``, the size and the rule.
    """
    name = values.get("model_type")
    if name not in TYPES:
        raise ValueError(f"{where}: model_type must be one of {', '.join(TYPES)}, got {str(name)[:60]!r}")
    kind, config = TYPES[name], _Config(where, values)
    hidden = config.size("hidden_size", most=WIDTH)
    layers = config.size("num_hidden_layers", most=LAYERS)
    experts = config.size("num_local_experts", "num_experts", "n_routed_experts", most=EXPERTS)
    top_k = config.size("num_experts_per_tok", most=EXPERTS)
    if top_k > experts:
        raise ValueError(f"{where}: num_experts_per_tok must be at most the number of experts, got {top_k}, {experts}")
    intermediate = config.size(kind.intermediate, most=WIDTH)
    moe_layers = kind.moe_layers(config, layers)
    if not moe_layers:
        raise ValueError(f"{where}: at least one layer must have experts")
    shared = config.size("shared_expert_intermediate_size", most=WIDTH, least=0, default=0)
    shared += intermediate * config.size("n_shared_experts", most=EXPERTS, least=0, default=0)
    dense = config.size("intermediate_size", most=WIDTH) if moe_layers < layers else 0
    bias = 2 * intermediate + hidden if kind.expert_bias else 0
    return Model(
        model_type=name,
        hidden=hidden,
        vocabulary=config.size("vocab_size", most=VOCABULARY),
        layers=layers,
        moe_layers=moe_layers,
        experts=experts,
        top_k=top_k,
        intermediate=intermediate,
        expert_parameters=3 * hidden * intermediate + bias,
        router_parameters=hidden * experts + experts * kind.router_bias,
        shared_parameters=3 * hidden * shared + hidden * (kind.shared_gate and shared > 0),
        shared_width=shared,
        dense_parameters=3 * hidden * dense,
        attention=kind.attention(config),
        norm_parameters=hidden * (2 * layers + 1),
        tied=config.flag("tie_word_embeddings", False),
    )
