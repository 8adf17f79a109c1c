"""Models that give an answer a score: a base with a head in float32, and its adapter.

A decoder's score is read at the last token of each row, found by length, so that an end of turn
that is also the padding counts. transformers' own classifiers pool the last token that is not the
padding's, which is the one before it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, TaskType, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from align.errors import ConfigError, StageError, first_line
from align.models.adapters import add_lora, keep_in_fp32
from align.models.load import (
    SEPARATED,
    compute_dtype,
    default_device,
    keep_gradients_on_cpu,
    load_config,
    missing,
    quantization,
    quiet,
)
from align.models.logprobs import unwrapped
from align.models.settings import Lora, Model

DECODER_HEAD = "score"  # what transformers calls a linear head on every token's hidden state
ENCODER_HEADS = ("classifier", "pre_classifier", "pooler", "head")
WEIGHTS = "adapter_model.safetensors"


def load_classifier(
    settings: Model, *, seed: int | None, device: torch.device | None = None
) -> Any:
    """The base with a head of one number, in evaluation mode; `score_adapter` makes it trainable.

    What the checkpoint does not hold (a language model has no such head) is drawn from `seed`:

        weight ~ N(0, 1 / (inputs + 1)),  bias = 0

    Huang et al. 2024, arXiv:2403.17031, detail 12. Not zeros: a head of zeros lets no gradient
    through to the adapter, and all seeds would be one.

    Args:
        seed: None: nothing is drawn, for the model is to score as it is.

    Raises:
        ConfigError: no such model, one without safetensors weights, or one that cannot classify.
        StageError: weights are missing that must not be drawn.
    """
    quiet()
    device = device or default_device()
    dtype = compute_dtype(settings, device)
    heads = head_names(settings)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            settings.name,
            revision=settings.revision,
            num_labels=1,
            dtype=dtype,
            quantization_config=quantization(settings, dtype, whole=heads),
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise missing(settings, "model", error) from error
    for name in heads:
        model.get_submodule(name).to(torch.float32)
    complete(model, sorted(info["missing_keys"]), settings=settings, heads=heads, seed=seed)
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # its own pooling, which nobody reads, would refuse a batch
    keep_gradients_on_cpu(model)
    return model.train(False)


def head_names(settings: Model) -> list[str]:
    """The modules between the backbone and the score, which stay whole and are trained whole.

    Raises:
        ConfigError: the architecture has no classifier that we know how to read.
    """
    config = load_config(settings)
    heads = known_heads(config)
    if not heads:
        raise ConfigError(
            f"model.name={settings.name}: a {config.model_type} has neither a decoder's nor an "
            "encoder's classifier, so it cannot score answers; give a causal language model or an "
            "encoder such as BERT"
        )
    return heads


def known_heads(config: Any) -> list[str]:
    """Their names by the configuration alone; none where we know no way to read the classifier."""
    try:
        with torch.device("meta"):
            bare = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    except ValueError:  # the architecture has none
        return []
    heads = heads_of(bare)
    readable = not config.is_encoder_decoder and {DECODER_HEAD, "classifier"} & set(heads)
    return heads if readable else []


def encodes(settings: Model) -> bool:
    """`is_encoder`, of a base that is not loaded.

    Raises:
        ConfigError: no such model.
    """
    return known_heads(load_config(settings)) not in ([], [DECODER_HEAD])


def is_encoder(model: Any) -> bool:
    """Whether it reads in both directions, and scores what its first token has become."""
    return not hasattr(unwrapped(model), DECODER_HEAD)


def heads_of(bare: Any) -> list[str]:
    """A classifier's modules between the backbone and the score, by their whole names."""
    if hasattr(bare, DECODER_HEAD):
        return [DECODER_HEAD]
    return [name for name, _ in bare.named_modules() if name.rpartition(".")[2] in ENCODER_HEADS]


@torch.no_grad()
def complete(
    model: Any, keys: Sequence[str], *, settings: Model, heads: Sequence[str], seed: int | None
) -> None:
    """Draws the head's weights that the checkpoint lacks; one order and one generator.

    Args:
        keys: of the weights that it lacks, sorted.

    Raises:
        StageError: none may be drawn.
        ConfigError: it lacks others, too, which would stay random.
    """
    if seed is None:
        if keys:
            raise StageError(
                f"{settings.name}: its checkpoint has no {keys[0]}, so its scores would be random; "
                "give a classifier that was trained, its head included"
            )
        return
    strange = [key for key in keys if not key.startswith(tuple(f"{head}." for head in heads))]
    if strange:
        raise ConfigError(
            f"model.name={settings.name}: its checkpoint has no {strange[0]} (and "
            f"{len(strange) - 1} more), so the base would be random; give a whole model"
        )
    generator = torch.Generator().manual_seed(seed)
    for key in keys:
        weight = model.get_parameter(key)
        drawn = torch.zeros(weight.shape)
        if weight.dim() > 1:
            drawn.normal_(std=(weight.shape[-1] + 1) ** -0.5, generator=generator)
        elif key.endswith("weight"):  # of a normalisation
            drawn.fill_(1)
        weight.copy_(drawn)


def score_adapter(model: Any, *, settings: Lora, seed: int) -> Any:
    """The classifier with a fresh trainable adapter; its head is trained whole and saved with it.

    Raises:
        ConfigError: `adapter.target_modules` names no layer of the model.
    """
    return add_lora(model, settings=settings, seed=seed, heads=heads_of(model))


def load_reward_model(settings: Model, folder: Path, *, device: torch.device | None = None) -> Any:
    """The base with a saved adapter and its head, frozen, in evaluation mode.

    Raises:
        StageError: the folder holds no adapter with a head, or one for another model.
    """
    model = load_classifier(settings, seed=0, device=device)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.task_type != TaskType.SEQ_CLS:
            raise ValueError("its adapter is a language model's, which has no head")
        config.base_model_name_or_path = None  # where it stood then; the weights say if it fits
        scorer = get_peft_model(model, config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unfit(folder, error) from error
    keep_in_fp32(scorer)  # before the weights come, which would be rounded otherwise
    load_weights(scorer, folder)
    return scorer.requires_grad_(False).train(False)


def load_weights(model: Any, folder: Path) -> None:
    """Puts a saved adapter and head into a classifier that has an adapter of that shape.

    Raises:
        StageError: they do not fit, or some are missing.
    """
    try:
        saved = load_file(folder / WEIGHTS)
        found: Any = set_peft_model_state_dict(model, saved)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise unfit(folder, error) from error
    lost = [key for key in found.missing_keys if "lora_" in key or "modules_to_save" in key]
    if lost or found.unexpected_keys:
        raise unfit(folder, ValueError(f"no {lost[0]}" if lost else found.unexpected_keys[0]))


def unfit(folder: Path, error: Exception) -> StageError:
    reason = first_line(error)
    return StageError(
        f"{folder}: no reward model for this base ({reason}); give the folder that a reward "
        "training on the same base wrote"
    )


def separator_of(model: Any, tokenizer: Any) -> int | None:
    """The token that ends the first segment of a row, for a model that is told its two texts apart
    as BERT is: where our template puts question and answer together. None elsewhere.
    """
    kinds = getattr(unwrapped(model).config.get_text_config(), "type_vocab_size", None) or 1
    told = kinds > 1 and tokenizer.chat_template == SEPARATED
    return int(tokenizer.sep_token_id) if told else None


def scores(
    model: Any, *, input_ids: torch.Tensor, lengths: torch.Tensor, separator: int | None = None
) -> torch.Tensor:
    """One score a row, [B], float32.

        decoder: r = w · h_last,    encoder: what its own head makes of the first token

    Rows are padded on the right. A decoder's padding stands behind what is read, so it needs no
    mask; the hidden states are taken while the outermost wrapper runs, so that data parallelism
    sees its forward pass.

    Args:
        model: a classifier, bare, with an adapter, or wrapped for data parallelism.
        input_ids: [B, T].
        lengths: [B], tokens of each row, its end of turn included.
        separator: see `separator_of`.
    """
    bare = unwrapped(model)
    if is_encoder(model):
        mask = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
        return own_scores(model, input_ids=input_ids, mask=mask, separator=separator)
    head, seen = getattr(bare, DECODER_HEAD), []

    def keep(module: Any, arguments: Any) -> Any:
        seen.append(arguments[0])
        # Its own result is not read; one state a row is enough for it to go on, in its own type.
        return arguments[0][:, :1].to(module.weight.dtype).expand_as(arguments[0])

    handle = head.register_forward_pre_hook(keep)
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        handle.remove()
    last = seen[0][torch.arange(len(lengths), device=lengths.device), lengths - 1]
    with torch.autocast(last.device.type, enabled=False):
        found: torch.Tensor = head(last.to(head.weight.dtype))[:, 0]
    return found.float()


def own_scores(
    model: Any, *, input_ids: torch.Tensor, mask: torch.Tensor, separator: int | None = None
) -> torch.Tensor:
    """One score a row as the model's own classifier reads it, [B], float32; `mask` [B, T] is True
    on its tokens.
    """
    given = {"input_ids": input_ids, "attention_mask": mask.long()}
    if separator is not None:
        given["token_type_ids"] = segments(input_ids, separator=separator)
    with heads_in_float32(unwrapped(model)):
        found: torch.Tensor = model(**given).logits
    return found[:, 0].float()


def segments(input_ids: torch.Tensor, *, separator: int) -> torch.Tensor:
    """[B, T], 0 up to each row's first separator, 1 behind it."""
    ends = (input_ids == separator).long()
    return (ends.cumsum(1) > ends).long()


@contextmanager
def heads_in_float32(bare: Any) -> Iterator[None]:
    """Within, heads compute in their own type, whatever the backbone and an autocast around them
    are in.
    """
    entered: list[Any] = []

    def enter(module: Any, arguments: Any) -> Any:
        weight = next(module.parameters())
        entered.append(torch.autocast(weight.device.type, enabled=False))
        entered[-1].__enter__()
        return tuple(a.to(weight.dtype) if torch.is_floating_point(a) else a for a in arguments)

    def leave(module: Any, arguments: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    layers = [
        module
        for name, module in bare.named_modules()
        if set(name.split(".")) & {DECODER_HEAD, *ENCODER_HEADS}
        and next(module.parameters(recurse=False), None) is not None
    ]
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
