"""The fake mode of a captured step. It notes ops that other threads run on the step's tensors, and lets them pass.

If threads run at once, the tensors alive at a moment depend on how they take turns, so such a step is refused. Only the thread of
the step raises the refusal: if it killed another thread, one that waits for that thread's result would wait for ever.
"""

from __future__ import annotations

import threading
from typing import Any

from ullage._errors import CaptureError
from ullage._source import source_line
from ullage._torch import FakeTensorMode


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.in_kernel = False
        self.enter_stack: list[Any] = []
        self.modules: list[str] = []


class StepMode(FakeTensorMode):
    """A fake mode in which several threads may run ops at once, unlike torch's.

    Attributes:
        owner: the thread that runs the step.
        beside: the error text for the first op that another thread ran; "" if none did.
    """

    def __init__(self) -> None:
        self._of_thread = _OfThread()
        self.owner = threading.get_ident()
        self.beside = ""
        super().__init__(allow_non_fake_inputs=False)

    def __deepcopy__(self, memo: Any) -> StepMode:
        return self  # a fake tensor that is copied stays in its mode

    @property
    def in_kernel_invocation(self) -> bool:
        """Is this thread inside a fake kernel?"""
        return self._of_thread.in_kernel

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, value: bool) -> None:
        self._of_thread.in_kernel = value

    @property
    def enter_stack(self) -> list[Any]:
        """This thread's entries into the mode."""
        return self._of_thread.enter_stack

    @enter_stack.setter
    def enter_stack(self, value: list[Any]) -> None:
        self._of_thread.enter_stack = value

    @property
    def allow_non_fake_inputs(self) -> bool:
        """True in other threads: they make real tensors, because the mode is not active there."""
        return not self.is_owner

    @allow_non_fake_inputs.setter
    def allow_non_fake_inputs(self, value: bool) -> None:
        pass

    @property
    def is_owner(self) -> bool:
        """Does this thread run the step?"""
        return threading.get_ident() == self.owner

    def enter_module(self, fqn: str) -> None:
        """Note that a module's forward begins in a thread that is not the owner."""
        self._of_thread.modules.append(fqn)

    def leave_module(self) -> None:
        """Note that such a forward ends."""
        if self._of_thread.modules:
            self._of_thread.modules.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op on fakes."""
        if not self.beside and not self.is_owner:
            place, within = source_line(), self._of_thread.modules[-1:]
            where = f"{place + ': ' if place else ''}{f'in module {within[0]}: ' if within and within[0] else ''}"
            self.beside = (
                f"{where}{func} runs in another thread than the step ({threading.current_thread().name}); the peak of threads that run at "
                "once depends on how they take turns, so it can't be planned: call the modules one after the other in the planned step, "
                "or use ullage.checkpoint in the threads, without a plan"
            )
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def check(self) -> None:
        """Raise CaptureError if another thread has run an op on the step's tensors."""
        if self.beside:
            raise CaptureError(self.beside)
