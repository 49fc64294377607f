"""Refuse a model that is checkpointed already by a switch of Hugging Face's or torch's own."""

from __future__ import annotations

from torch import nn

from ullage._errors import AlreadyCheckpointed


def refuse_existing(model: nn.Module) -> None:
    """Raise AlreadyCheckpointed, naming the module and the switch."""
    for name, module in model.named_modules():
        switch = None
        for attribute in ("gradient_checkpointing", "activation_checkpointing"):
            if getattr(module, attribute, False) is True:
                switch = f"Hugging Face's switch ({attribute}=True); call model.gradient_checkpointing_disable()"
        if hasattr(module, "_checkpoint_wrapped_module"):
            switch = "torch's checkpoint_wrapper; apply the plan to the unwrapped model"
        if switch is not None:
            raise AlreadyCheckpointed(
                f"{name or 'the model'}: is checkpointed already by {switch}; plans do not stack on it"
            )
