"""Refuse a model that a switch of Hugging Face's or torch's own checkpoints already."""

from __future__ import annotations

from torch import nn

from ullage._errors import AlreadyCheckpointed

_SWITCHES = ("activation_checkpointing", "gradient_checkpointing")  # the new name first


def refuse_existing(model: nn.Module) -> None:
    """Raise AlreadyCheckpointed, naming the module and the switch."""
    for name, module in model.named_modules():
        switch = None
        for attribute in _SWITCHES:
            if getattr(module, attribute, False) is True:
                off = next((f"{a}_disable" for a in _SWITCHES if hasattr(model, f"{a}_disable")), "")
                todo = f"call model.{off}()" if off else f"set {attribute}=False"
                switch = f"Hugging Face's switch ({attribute}=True); {todo}"
        if hasattr(module, "_checkpoint_wrapped_module"):
            switch = "torch's checkpoint_wrapper; apply the plan to the unwrapped model"
        if switch is not None:
            raise AlreadyCheckpointed(
                f"{name or 'the model'}: is checkpointed already by {switch}; plans do not stack on it"
            )
