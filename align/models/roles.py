"""Several models in one: named adapters and heads on one frozen base, one at work at a time.

A role is the bare base or the base with one adapter, perhaps with a head that turns its last hidden
state into a number. Entering a role changes which adapter the layers add, and nothing else: PEFT's
own `set_adapter` and `disable_adapter` also freeze and thaw weights, so that of two roles that are
trained together one would silently stand still.
"""

import copy
import hashlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers.modeling_layers import GradientCheckpointingLayer

from align.errors import StageError
from align.models.adapters import add_lora, keep_in_fp32, read_adapter, save_adapter
from align.models.fused_lora import fuse
from align.models.settings import Lora

HEAD = "base_model.model.score.weight"  # where a classifier's adapter keeps its head


class Head(torch.nn.Module):
    """A number per position from the last hidden state, [B, T, H] to [B, T], in float32 whatever
    the base is in.
    """

    def __init__(self, weight: torch.Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone().reshape(-1).float())
        self.bias = torch.nn.Parameter(torch.tensor(float(bias), device=weight.device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            found: torch.Tensor = hidden.to(self.weight.dtype) @ self.weight + self.bias
        return found


@dataclass(frozen=True, kw_only=True)
class Role:
    """`adapter` None is the bare base; `model` None is the one that the roles share. A role that
    is not the `owner` runs on another one's weights.
    """

    adapter: str | None = None
    head: Head | None = None
    model: Any = None
    owner: bool = True


class Roles:
    """The roles on one base, which is frozen.

    Example:
        roles = Roles(load_model(settings))
        roles.add("policy", settings=lora, seed=0)
        roles.bind("reference")
        with roles.role("policy") as model: ...
    """

    def __init__(self, base: Any) -> None:
        base.requires_grad_(False)
        self.model = base
        self.bound: dict[str, Role] = {}
        self.trained: set[str] = set()
        self.active: str | None = None
        self.layers: list[Any] = []  # that add an adapter's output
        self.recomputed: list[torch.nn.Module] = []  # that forget their activations

    @contextmanager
    def role(self, name: str) -> Iterator[Any]:
        """The model that runs as `name` within; afterwards, whatever ran before.

        On a base in half precision what is trained stands in float32 and is multiplied in the
        base's type (mixed precision): an adapter would otherwise have each layer keep its input in
        float32. A whole model is not trained in float16, whose gradients would overflow.

        Layers that recompute their activations do so only where gradients are wanted: with
        recomputation they would drop the cache that sampling lives on.
        """
        bound, before = self.bound[name], self.active
        armed = [layer.training for layer in self.recomputed]
        for layer in self.recomputed:
            layer.training = torch.is_grad_enabled()
        self.switch(bound.adapter)
        dtype = self.model.dtype
        half = dtype == torch.bfloat16 or (dtype == torch.float16 and bound.model is None)
        try:
            with torch.autocast(self.model.device.type, dtype=dtype, enabled=half):
                yield self.model if bound.model is None else bound.model
        finally:
            self.switch(before)
            for layer, was in zip(self.recomputed, armed, strict=True):
                layer.training = was

    def switch(self, adapter: str | None) -> None:
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self.active = adapter

    def head(self, name: str) -> Head:
        found = self.bound[name].head
        assert found is not None, f"{name} has no head"
        return found

    # How roles come about.

    def bind(self, name: str, *, model: Any = None) -> None:
        """Gives a role's name to the bare base, or to a model of its own."""
        self.bound[name] = Role(model=model)

    def attach(self, name: str, trunk: str, *, head: Head | None = None) -> None:
        """A head on another role's weights, which stay that role's; or a second name for it."""
        self.bound[name] = replace(self.bound[trunk], head=head, owner=False)

    def add(self, name: str, *, settings: Lora, seed: int, head: Head | None = None) -> None:
        """A role with a fresh trainable adapter; it starts as the base."""
        self.model = add_lora(self.model, settings=settings, seed=seed, name=name)
        self.settle(name, head, trained=True)

    def load(self, name: str, folder: Path, *, trained: bool = False) -> None:
        """A role with a saved adapter, and with the head that is saved in it, if there is one.

        Raises:
            StageError: no adapter stands there, or one that was trained on another base.
        """
        saved = read_adapter(folder)
        weight = saved.state.pop(HEAD, None)
        saved.config.task_type, saved.config.modules_to_save = "CAUSAL_LM", None
        saved.config.exclude_modules = None  # the head, which the base has not
        width = self.model.config.get_text_config().hidden_size
        if weight is not None and weight.numel() != width:
            raise unfit(folder, f"its head takes {weight.numel()} values, the base gives {width}")
        try:
            self.put(name, saved.config, saved.state)
        except (ValueError, RuntimeError) as error:
            raise unfit(folder, str(error).strip().splitlines()[-1].strip()) from error
        head = None if weight is None else Head(weight.to(self.model.device))
        if head is not None:
            head.requires_grad_(trained)
        self.settle(name, head, trained=trained)

    def copy(self, name: str, source: str, *, head: Head | None = None) -> None:
        """A trainable role that starts with the weights of another one's adapter."""
        adapter = self.bound[source].adapter
        assert adapter is not None, "the bare base is added, not copied"
        state = get_peft_model_state_dict(self.model, adapter_name=adapter)
        kept = {key: value.clone() for key, value in state.items()}
        self.put(name, copy.deepcopy(self.model.peft_config[adapter]), kept)
        self.settle(name, head, trained=True)

    def put(self, name: str, config: PeftConfig, state: dict[str, torch.Tensor]) -> None:
        """Adds an adapter with given weights.

        Raises:
            ValueError, RuntimeError: they are not all there, or not of the base's shapes.
        """
        # The base as it is called now: it may have moved since the adapter was saved.
        if isinstance(self.model, PeftModel):
            config.base_model_name_or_path = str(self.model.get_base_model().name_or_path)
            self.model.add_adapter(name, config)
        else:
            config.base_model_name_or_path = None  # PEFT writes it
            self.model = get_peft_model(self.model, config, adapter_name=name)
        expected = set(get_peft_model_state_dict(self.model, adapter_name=name))
        if odd := sorted(expected ^ set(state)):
            raise ValueError(f"{len(odd)} weights are on one side only, {odd[0]} among them")
        set_peft_model_state_dict(self.model, state, adapter_name=name)

    def settle(self, name: str, head: Head | None, *, trained: bool) -> None:
        """Undoes what PEFT did to other adapters: who was to train trains, in float32, and the role
        at work stays at work.
        """
        self.bound[name] = Role(adapter=name, head=head)
        if trained:
            self.trained.add(name)
        self.model.requires_grad_(False)
        for each in self.model.peft_config:
            for parameter in self.adapter_parameters(each):
                parameter.requires_grad_(each in self.trained)
                if each not in self.trained:  # frozen ones cost no more than the base's precision
                    parameter.data = parameter.data.to(self.model.dtype)
        keep_in_fp32(self.model)
        fuse(self.model, name)
        self.model.eval()
        self.layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        self.switch(self.active)

    # What they are made of.

    def adapter_parameters(self, adapter: str) -> list[torch.nn.Parameter]:
        own = re.compile(rf"\.lora_\w+\.{re.escape(adapter)}(\.|$)")
        return [p for key, p in self.model.named_parameters() if own.search(key)]

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        """What is trained of a role: its adapter's weights (or all of its own model's) and its
        head's.
        """
        bound = self.bound[name]
        found: list[torch.nn.Parameter] = []
        if bound.owner and bound.adapter is not None:
            found = self.adapter_parameters(bound.adapter)
        if bound.owner and bound.model is not None:
            found = list(bound.model.parameters())
        if bound.head is not None:
            found += list(bound.head.parameters())
        return [parameter for parameter in found if parameter.requires_grad]

    def save(self, name: str, folder: Path) -> None:
        """What is a role's own: its adapter as plain PEFT, or its whole model; and its head."""
        folder.mkdir(parents=True, exist_ok=True)
        bound = self.bound[name]
        if bound.owner and bound.adapter is not None:
            save_adapter(self.model, folder, name=bound.adapter)
        if bound.owner and bound.model is not None:
            bound.model.save_pretrained(folder)
        if bound.head is not None:
            head = {key: value.cpu() for key, value in bound.head.state_dict().items()}
            save_file(head, folder / "head.safetensors")

    def recompute(self) -> None:
        """Gradient checkpointing in which the role of the forward pass is the role of the
        recomputation, whichever is at work by then.

        Raises:
            StageError: the model's layers cannot, or they draw random numbers.
        """
        inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        models = [inner, *(r.model for r in self.bound.values() if r.model is not None)]
        for model in models:
            if not model.supports_gradient_checkpointing:
                raise StageError(
                    "algorithm.gradient_checkpointing=true: this model cannot recompute its "
                    "activations; type algorithm.gradient_checkpointing=false"
                )
            options = {"use_reentrant": False, "context_fn": self.same_role}
            model.activation_checkpointing_enable(options)
            self.recomputed += [
                m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
            ]
        for model in models:
            self.check_still(model)

    @torch.enable_grad()
    def check_still(self, model: Any) -> None:
        """Some layers (OPT's) draw dropout by the same flag that arms their recomputation.

        Raises:
            StageError: two passes differ.
        """
        ids = torch.tensor([[1, 2]], device=model.device)
        for layer in self.recomputed:
            layer.training = True
        try:
            one, other = (model(input_ids=ids, use_cache=False).logits.detach() for _ in range(2))
        finally:
            for layer in self.recomputed:
                layer.training = False
        if not torch.equal(one, other):
            raise StageError(
                "algorithm.gradient_checkpointing=true: recomputation would switch on the dropout "
                "in this model's layers; type algorithm.gradient_checkpointing=false"
            )

    def same_role(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What surrounds a layer's forward pass and its recomputation."""
        return nullcontext(), self.as_adapter(self.active)

    @contextmanager
    def as_adapter(self, adapter: str | None) -> Iterator[None]:
        before = self.active
        self.switch(adapter)
        try:
            yield
        finally:
            self.switch(before)


def unfit(folder: Path, reason: str) -> StageError:
    return StageError(
        f"{folder}: does not fit the base model ({reason}); give an adapter that was trained on "
        "the same base"
    )


def weights_hash(model: Any) -> str:
    """SHA-256 of the base's weights and buffers, adapters left out: training must not change it."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor) and ".lora_" not in key:
            digest.update(key.replace("base_model.model.", "").replace(".base_layer", "").encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
