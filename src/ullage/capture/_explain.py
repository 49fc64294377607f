"""Explain errors that Python or torch raises while a step is captured: line, module, cause and remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ullage._errors import CaptureError, UllageError
from ullage._source import files_of, line_of
from ullage.capture._kernels import NeedsValues
from ullage.capture._layouts import NO_NESTED

# Words of torch's errors that are about fake tensors. With none of them, real tensors would raise the same error.
_OF_FAKES = ("fake", "meta", "subclass", "data pointer", "data_ptr", "access storage", "shape_env", "not allocated")
_FAKE_CODE = ("/torch/_subclasses/", "/torch/nested/", "/torch/_functorch/", "/torch/fx/experimental/")
_AS_AN_OP = "make it an op with a fake kernel (torch.library.custom_op, register_fake), or leave it out of the step"


@dataclass(frozen=True)
class FailedOp:
    """An op that failed on fake tensors, with its error, line and module."""

    error: BaseException
    func: Any
    place: str
    module: str


def explained(error: Exception, op: FailedOp | None, module: str, read: dict[str, None]) -> CaptureError:
    """Return the error as a CaptureError with the user's line, the module, the cause and the remedy.

    Args:
        error: the error; one of ullage's own only gets its line and module.
        op: the last op that failed; it may belong to another error.
        module: the fully qualified name of the module that runs, "" outside of every module.
        read: lines that read values which depend on activations, and so were made up.
    """
    if op is not None and not any(e is op.error for e in chain(error)):
        op = None
    place = (op.place if op is not None else "") or line_of(error)
    within = (op.module if op is not None else "") or module
    head = f"{place}: " if place else ""
    head += f"in module {within}: " if within else ""
    return CaptureError(head + _cause(error, op) + (_made_up(read) if read else ""))


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that led to it."""
    seen: set[int] = set()
    todo: BaseException | None = error
    while todo is not None and id(todo) not in seen:
        seen.add(id(todo))
        yield todo
        todo = todo.__cause__ or todo.__context__


def _cause(error: Exception, op: FailedOp | None) -> str:
    if isinstance(error, UllageError):
        return str(error)
    if isinstance(error, NeedsValues):
        return (
            f"{error}, which a step on fake tensors does not have; take the size of a real step (values='run') or an assumed one "
            f"(values='assumed', or assume={{'{error.place.rpartition('/')[2] or 'mask'}': number}}), use a form of fixed shape (torch.where or a factor of 0 "
            "instead of x[mask], topk with a fixed k), or give the mask or the index with the batch"
        )
    said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    for matches, says in _KNOWN:
        if matches(error, op):
            return f"{says.format(op=op.func if op is not None else 'the call', said=said)} ({said})"
    if not _is_about_fakes(error, op):
        return f"the step itself raises {said}; that has nothing to do with a plan: run the step once without ullage and mend it"
    what = f"{op.func} can't be run on fake tensors" if op is not None else "the step can't be run on fake tensors"
    return f"{what}, which is how a step is planned: {said}; {_AS_AN_OP}"


def _is_about_fakes(error: Exception, op: FailedOp | None) -> bool:
    if any(word in str(error).lower() for word in _OF_FAKES) or type(error).__name__ == "UnsupportedOperatorException":
        return True
    last = files_of(error)[-1:]
    inside = any(part in file for file in last for part in _FAKE_CODE)
    return inside and not (op is not None and isinstance(error, RuntimeError | ValueError | IndexError | TypeError))


def _made_up(read: dict[str, None]) -> str:
    return f"; values that depend on activations were read at {', '.join(read)} and taken to be 1, which may be why"


def _no_fake_kernel(error: Exception, op: FailedOp | None) -> bool:
    told = ("no fake impl", "register_fake", "from the 'Meta' backend", "on the Meta backend")
    return type(error).__name__ == "UnsupportedOperatorException" or any(t in str(error) for t in told)


def _is_nested(error: Exception, op: FailedOp | None) -> bool:
    return any("/torch/nested/" in f for f in files_of(error)) or "nested" in str(error).lower()


def _is_memory(error: Exception, op: FailedOp | None) -> bool:
    return not _is_sparse(error, op) and any(
        t in str(error).lower() for t in ("data pointer", "data_ptr", "access storage", "not allocated")
    )


def _is_forward_mode(error: Exception, op: FailedOp | None) -> bool:
    return _is_memory(error, op) and any("/torch/_functorch/" in f for f in files_of(error))


def _is_higher_order(error: Exception, op: FailedOp | None) -> bool:
    return isinstance(error, NotImplementedError) and "HigherOrderOperator" in str(error)


def _is_sparse(error: Exception, op: FailedOp | None) -> bool:
    return any(t in str(error).lower() for t in ("sparse", "is_coalesced"))


_KNOWN: tuple[tuple[Callable[[Exception, FailedOp | None], bool], str], ...] = (
    (
        _is_nested,
        NO_NESTED,
    ),
    (
        _no_fake_kernel,
        "{op} has no fake kernel, which says what shapes it gives: write one with torch.library.register_fake",
    ),
    (
        _is_higher_order,
        "a higher-order op (torch.cond, torch.while_loop, torch.scan) goes its way by values, which a step on fake tensors does not have; choose with "
        "torch.where or write the loop in Python for the planned step",
    ),
    (
        _is_forward_mode,
        "forward-mode derivatives (torch.func.jvp, jacfwd) can't be run on fake tensors; take them with torch.func.vjp or torch.autograd.grad, "
        "or use ullage.checkpoint, which knows them, without a plan",
    ),
    (
        _is_memory,
        "it reads the memory of a tensor itself (ctypes, an extension, a kernel), and fake tensors have none; "
        + _AS_AN_OP,
    ),
    (
        _is_sparse,
        "{op} on sparse tensors can't be run on fake tensors; make the sparse product an op of yours with a fake kernel "
        "(torch.library.custom_op, register_fake) that holds the sparse tensor, or use a dense one",
    ),
)
