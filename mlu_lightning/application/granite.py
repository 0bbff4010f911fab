"""Export to Hugging Face's Granite, whose config has a place for every multiplier, so that weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlu_lightning.application.multipliers import state_with
from mlu_lightning.application.state_mark import without_mark
from mlu_lightning.planning import Plan
from mlu_lightning.utilities.names import listed, original_module
from mlu_lightning.utilities.state import preserve_state

if TYPE_CHECKING:
    from transformers import GraniteConfig, GraniteForCausalLM


def to_granite(module: nn.Module, plan: Plan) -> GraniteForCausalLM:
    """Make a Hugging Face Granite model of a Llama-like one, with copies of its weights and the multipliers in its config.

    A Granite model is a Llama whose config has ``residual_multiplier`` (here α/l), ``logits_scaling`` (d),
    ``attention_multiplier`` and ``embedding_multiplier`` (theory.md, section 3), so nothing is folded, tied embeddings stay
    tied, and ``from_pretrained`` needs nothing of this package. Any model will do that has Granite's parameters and
    computes what it computes, as a few tokens show: Llama, Mistral without a sliding window, Granite itself. For others,
    and where branches have different multipliers, there is :func:`mlu_lightning.bake`. To train the exported model
    further, scale learning rate, eps and weight decay of every parameter by ``plan.scales(family)``, and by their
    ``.folded(family)`` after ``residual="fold"``, where the config has only what is not in the weights.

    Args:
        module: Hugging Face model for causal language modelling, or a LightningModule with one inside, with the plan's
            multipliers (after loading a checkpoint: :func:`mlu_lightning.restore_multipliers`); not changed.
        plan: its plan, such as ``MLUCallback.plan`` after ``fit``.

    Raises:
        ImportError: without transformers.
        ValueError: if the plan's multipliers are not in the module, or if Granite cannot represent it.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from mlu_lightning import attach_multipliers
    >>> def llama(layers, heads):
    ...     return LlamaForCausalLM(LlamaConfig(
    ...         vocab_size=50, num_hidden_layers=layers, num_attention_heads=heads, hidden_size=8 * heads,
    ...         intermediate_size=24 * heads, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    ...     ))
    >>> model, tokens = llama(layers=4, heads=6), torch.arange(16).reshape(2, 8)
    >>> plan = Plan.from_model(model, {"input_ids": tokens, "labels": tokens}, base=llama(layers=1, heads=2))
    >>> handle = attach_multipliers(model, plan)
    >>> exported = to_granite(model, plan)
    >>> exported.config.residual_multiplier, exported.config.logits_scaling
    (0.25, 3.0)
    >>> torch.allclose(exported(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)
    True
    """
    try:
        from transformers import GraniteForCausalLM, PreTrainedModel
    except ImportError as error:
        raise ImportError(
            "to_granite needs Hugging Face transformers: pip install 'mlu-lightning[hf]', or pip install transformers."
        ) from error
    plain = original_module(module)
    acting = state_with(plain, plan).acting
    plan.check(plain)
    models = ((name, part) for name, part in plain.named_modules() if isinstance(part, PreTrainedModel))
    prefix, model = next(models, ("", None))
    if model is None:
        raise ValueError(
            f"There is no Hugging Face model in this {type(module).__name__}, and only such a model can become a Granite "
            "model. Put the multipliers into the weights instead: bake(module, plan)."
        )
    outside = [m.name for m in plan.multipliers if prefix and not m.name.startswith(f"{prefix}.")]
    if outside:
        raise _not_granite(model, f"{outside[0]!r}, which the plan multiplies, is outside of it")

    factors = {multiplier: acting.get(multiplier, 1.0) for multiplier in plan.multipliers}
    logits = {multiplier.name: factor for multiplier, factor in factors.items() if multiplier.kind == "logits"}
    config = _config(
        model,
        residual=_only(model, "branches", (factor for m, factor in factors.items() if m.kind == "branch")),
        attention=_only(model, "attention logits", (logits.get(b.name, 1.0) for b in plan.branches if b.head_dim)),
        readout=_only(model, "readouts", (factor for m, factor in factors.items() if m.kind == "readout")),
    )
    _check_weights(model, config)
    _check_window(model)
    copies = {name: value.detach().clone() for name, value in without_mark(model.state_dict()).items()}
    exported: GraniteForCausalLM = GraniteForCausalLM.from_pretrained(
        None, config=config, state_dict=copies, attn_implementation=model.config._attn_implementation
    )
    nn.Module.to(exported, model.device)
    _check_function(model, exported)
    return exported


def _config(model: Any, residual: float, attention: float, readout: float) -> GraniteConfig:
    """The model's config as Granite's, with factors on what the model multiplies by itself."""
    from transformers import GraniteConfig

    own = model.config.to_dict()
    names = {*GraniteConfig().to_dict(), "head_dim"} - {"model_type", "architectures", "transformers_version"}
    config = GraniteConfig(**{name: value for name, value in own.items() if name in names})
    heads = own.get("num_attention_heads", config.num_attention_heads)
    head_dim = own.get("head_dim") or config.hidden_size // heads
    config.residual_multiplier = own.get("residual_multiplier", 1.0) * residual
    config.attention_multiplier = own.get("attention_multiplier", head_dim**-0.5) * attention
    config.logits_scaling = own.get("logits_scaling", 1.0) / readout
    return config


def _only(model: nn.Module, what: str, factors: Iterable[float]) -> float:
    distinct = sorted({*factors}) or [1.0]
    if len(distinct) > 1:
        listed = ", ".join(f"{factor:g}" for factor in distinct)
        raise _not_granite(model, f"its {what} have different multipliers, {listed}, and Granite has one")
    return distinct[0]


def _check_window(model: Any) -> None:
    """Refuse a model that does not attend to everything before, which a few tokens would not show."""
    config = model.config.to_dict()
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if window is not None and window < positions:
        why = (
            f"it attends to the last {window} tokens of up to {positions}, and Granite to all; if it was trained on "
            "shorter sequences only, set its config.sliding_window to None"
        )
        raise _not_granite(model, why)


def _check_weights(model: nn.Module, config: GraniteConfig) -> None:
    """Refuse a model whose parameters and buffers are not those of Granite."""
    from transformers import GraniteForCausalLM

    with torch.device("meta"):
        wanted = {name: [*value.shape] for name, value in GraniteForCausalLM(config).state_dict().items()}
    given = {name: [*value.shape] for name, value in without_mark(model.state_dict()).items()}
    found = [f"{name} {given[name]} is not in Granite" for name in given if name not in wanted]
    found += [f"Granite has {name} {wanted[name]}" for name in wanted if name not in given]
    both = [name for name in given if name in wanted and wanted[name] != given[name]]
    found += [f"{name} is {given[name]}, and Granite's {wanted[name]}" for name in both]
    if found:
        raise _not_granite(model, f"it has other weights: {listed(found, 4, '; ')}")


@torch.no_grad()
def _check_function(model: Any, exported: Any) -> None:
    """Refuse a model that computes something else than Granite with the same weights, on a few tokens."""
    config = exported.config
    length = min(16, config.max_position_embeddings)
    tokens = (torch.arange(2 * length, device=model.device) * 7919 % config.vocab_size).reshape(2, length)
    with preserve_state(model):
        model.eval()
        expected: Tensor = model(input_ids=tokens, use_cache=False).logits
    difference = (exported(input_ids=tokens, use_cache=False).logits - expected).abs().max() / expected.abs().max()
    # norms and softmax are computed in float32; other functions differ by far more than the square root of rounding
    tolerance = max(torch.finfo(dtype).eps for dtype in (expected.dtype, torch.float32)) ** 0.5
    if not difference <= tolerance:
        by = f"logits of a few tokens differ by {float(difference):.2g} of the largest"
        raise _not_granite(model, f"it computes something else with the same weights: {by}")


def _not_granite(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"This {type(model).__name__} cannot become a Granite model: {why}. To save it as the model that it is, put the "
        "multipliers into its weights: bake(module, plan)."
    )
