"""Which options of PEFT's ``LoraConfig`` gossamer computes."""

from __future__ import annotations

import dataclasses

from peft.tuners.lora.config import LoraConfig

# Supported options of LoraConfig. The last two lines do not affect a forward pass: they choose layers or initial
# values.
SUPPORTED = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"),
    *("rank_pattern", "alpha_pattern", "target_parameters", "bias", "modules_to_save", "trainable_token_indices"),
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "ensure_weight_tying", "layer_replication"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
)


def check_config(adapter_name: str, config: object) -> None:
    """Check that an adapter's config sets only supported options.

    Raises:
        ValueError: with the adapter's name and each unsupported option.
    """
    if type(config) is not LoraConfig:
        kind = getattr(getattr(config, "peft_type", None), "value", type(config).__name__)
        raise ValueError(f"adapter {adapter_name!r} must be of a LoraConfig, got {kind}")
    refused = []
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(config, field.name)
        if field.name not in SUPPORTED and value != default and bool(value):
            refused.append(f"{field.name}={value!r}")
    if config.init_lora_weights == "mica":
        refused.append("init_lora_weights='mica'")
    if config.lora_bias and config.use_dora:
        refused.append("lora_bias=True with use_dora=True")
    if getattr(config, "_custom_modules", None):
        refused.append("custom modules")
    if refused:
        raise ValueError(
            f"adapter {adapter_name!r} sets options that gossamer does not compute: {', '.join(refused)}; computed are "
            "r, lora_alpha, lora_dropout, use_rslora, use_dora, lora_bias, fan_in_fan_out, rank_pattern, alpha_pattern "
            "and target_parameters"
        )
