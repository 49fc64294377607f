"""`ullage.checkpoint`: a drop-in for `torch.utils.checkpoint.checkpoint(use_reentrant=False)`, and more."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint as torchs
from torch import nn

from ullage._errors import ArgumentError, ReplayError
from ullage._torch import checkpoint_debug, checkpoint_early_stop, in_forward_mode, peek_interpreter, tell
from ullage.runtime.forward._frame import Frame
from ullage.runtime.ops._keep import Keep, rule_of, torch_contexts
from ullage.runtime.state._reach import Reached, objects_in, roots_of
from ullage.runtime.unit._options import Options
from ullage.runtime.unit._site import Site

_CHECKS = ("default", "none", "values")
# Of one module or function; the oldest is dropped and learns again. A function that closes over a new object at each call (a lambda
# in a loop) makes a site per object. Not tuned.
_MOST_SITES = 64

_options = functools.cache(Options)  # its arguments are flags and names, so there are few combinations
# The sites between calls: by module and function, or by a plain function's code.
_sites: WeakKeyDictionary[Any, dict[Hashable, Site]] = WeakKeyDictionary()


def checkpoint(
    function: Callable[..., Any] | None = None,
    *args: Any,
    keep: Keep | None = None,
    use_reentrant: bool | None = None,
    preserve_rng_state: bool = True,
    preserve_host_rng: bool = False,
    determinism_check: str = "default",
    early_stop: bool = True,
    context_fn: Callable[[], tuple[Any, Any]] | None = None,
    debug: bool = False,
    respect_saved_tensors_hooks: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Call `function(*args, **kwargs)` without keeping its activations; backward runs it again.

    Gradients, buffers and generators are bitwise those of the plain call. Without grad mode it is the plain call.

        y = ullage.checkpoint(block, x)                              # instead of block(x)
        y = ullage.checkpoint(block, x, keep="matmul_attention")     # a replay runs no matmul and no attention

        @ullage.checkpoint(keep="attention")                         # or as a decorator
        def block(x): ...

    Args:
        function: a module or any callable; None (or a function that lacks arguments) makes a decorator.
        args: its positional arguments, of any kind; tensors in lists, tuples and dicts too.
        keep: which saved tensors to keep: None (none of them), the name of a level ("matmul_attention",
            "half_matmul_attention", "attention"), a collection of op overloads, or a callable `op -> bool`. An op that is named is not run
            again: its saved output is kept, or, if autograd doesn't save it, the nearest saved tensors computed from it.
        use_reentrant: None or False; only there for code that passes it to torch.
        preserve_rng_state: replay with the generators of the CPU and of the devices of `args` as they were on entry.
        preserve_host_rng: the same for Python's `random` and numpy's global generator. If the first call draws
            from them, later ones are covered without asking.
        determinism_check: "default": compare shapes, strides, dtypes and devices of the saved tensors. "values": compare also
            a digest of every dropped tensor, on every call (slow). "none": compare nothing.
        early_stop: end a replay as soon as the last saved tensor is rebuilt; `torch.utils.checkpoint.set_checkpoint_early_stop` has precedence.
        context_fn: returns the contexts around forward and around the replay, as for torch; not together with `keep`.
        debug: keep the names of all ops, and show in a ReplayError the first op at which forward and replay differ.
        respect_saved_tensors_hooks: an argument of torch 2.14: whether saved-tensor hooks around the call see the kept tensors of `keep`
            or `context_fn`. Here they don't, so True is refused together with these.
        kwargs: keyword arguments of `function`.

    Raises:
        ArgumentError: an option has an unknown value, or does not go with another one.
        ReplayError: in backward: the replay differs from the forward.

    Source: the saved-tensor-hook design follows `torch.utils.checkpoint` (non-reentrant); selective replay without a
    dispatch mode in forward is ullage's own, see docs/runtime.md.
    """
    if torch.compiler.is_compiling():
        return _compiled(function, args, kwargs, keep, preserve_rng_state, context_fn)
    if function is None or (not args and not kwargs and _lacks_arguments(function)):
        given = {
            "keep": keep, "use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state, "preserve_host_rng": preserve_host_rng,
            "determinism_check": determinism_check, "early_stop": early_stop, "context_fn": context_fn, "debug": debug,
            "respect_saved_tensors_hooks": respect_saved_tensors_hooks,
        }  # fmt: skip
        return functools.partial(_decorate, options=given) if function is None else _decorate(function, given)
    if context_fn is torchs.noop_context_fn:
        context_fn = None
    if not callable(function):
        raise ArgumentError(f"function: expected something to call, got {type(function).__name__}")
    if use_reentrant:
        raise ArgumentError("use_reentrant=True: ullage has the non-reentrant kind only; leave it out")
    if determinism_check not in _CHECKS:
        raise ArgumentError(f"determinism_check={determinism_check!r}: expected one of {', '.join(map(repr, _CHECKS))}")
    told_debug = checkpoint_debug()
    if told_debug is not None:
        debug = told_debug
    if context_fn is not None and (keep is not None or debug):
        other = "keep" if keep is not None else "debug" if told_debug is None else "set_checkpoint_debug_enabled(True)"
        raise ArgumentError(f"context_fn: not together with {other}; leave one out")
    if respect_saved_tensors_hooks and (keep is not None or context_fn is not None):
        raise ArgumentError(
            "respect_saved_tensors_hooks=True: what is kept does not pass the hooks around the call; "
            f"leave it out, or leave out {'keep' if keep is not None else 'context_fn'}"
        )
    rule = rule_of(keep) if keep is not None else None
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    told_early_stop = checkpoint_early_stop()
    if told_early_stop is not None:
        early_stop = told_early_stop
    make = _options if rule is None and context_fn is None else Options
    options = make(rule, preserve_rng_state, determinism_check, early_stop, context_fn, debug, preserve_host_rng)
    site, reached = _site_of(function, rule, context_fn is None, args, kwargs)
    return run(site, options, function, args, kwargs, reached=reached)


def run(
    site: Site,
    options: Options,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    on_replay: Callable[[], None] | None = None,
    reached: Reached | None = None,
) -> Any:
    """Run one call of a unit; grad mode must be on."""
    # torch.func and forward-mode AD get torch's own checkpoint
    if peek_interpreter() is not None or in_forward_mode():
        return torchs.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=options.preserve_rng_state, **kwargs
        )
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise ReplayError(
            f"{site.name}: a CUDA graph is being captured; a replay's checks and generators are not part of a graph. "
            "Capture the plain module, or use torch.utils.checkpoint there"
        )
    frame = Frame(site, options, function, args, kwargs, on_replay, reached)
    out = frame.forward(args, kwargs)
    if options.place is not None and options.place.feeds and site.trail is not None:
        site.trail.note(frame, out)
    return out


def _lacks_arguments(function: Any) -> bool:
    """Would `function()` lack arguments? Then `checkpoint` is used as a decorator."""
    if isinstance(function, nn.Module) or not callable(function):
        return False
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:
        return False
    return False


def _decorate(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, **options, **kwargs) if args or kwargs else _no_arguments(function, options)

    return checkpointed


def _no_arguments(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    return checkpoint(lambda: function(), **options)


def _site_of(
    function: Callable[..., Any], rule: Any, plain: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Site, Reached]:
    """Return the site of a unit, found by what the function reaches: one function may run many modules, each a unit of its own."""
    owner, name = _owner(function)
    reached = Reached(roots_of(function) + objects_in(args, kwargs))
    if isinstance(owner, types.CodeType):
        owner, others = (reached.modules[0] if reached.modules else owner), (owner, *reached.identity())
    else:
        others = reached.identity(without=owner)
    key = (name, others, rule, plain)
    try:
        sites = _sites.get(owner)
        if sites is None:
            sites = _sites[owner] = {}
        site = sites.get(key)
    except TypeError:  # not hashable, or has no weak references
        return Site(name), reached
    if site is None:
        if len(sites) >= _MOST_SITES:
            del sites[next(iter(sites))]
        tell()
        site = sites[key] = Site(name)
    return site, reached


def _owner(function: Any) -> tuple[Any, str]:
    """Return the module, or else the code or class, that a callable runs; and its name."""
    if isinstance(function, functools.partial):
        return _owner(function.func)
    if isinstance(function, types.MethodType):
        name = f"{type(function.__self__).__name__}.{getattr(function.__func__, '__name__', '')}"
        if isinstance(function.__self__, nn.Module):
            return function.__self__, name
        return getattr(function.__func__, "__code__", function.__func__), name
    if isinstance(function, types.FunctionType):
        return function.__code__, function.__qualname__
    if isinstance(function, nn.Module):
        return function, type(function).__name__
    call = getattr(type(function).__call__, "__code__", None)
    return (call if call is not None else function), getattr(function, "__name__", type(function).__name__)


def _compiled(function: Any, args: Any, kwargs: Any, keep: Any, preserve_rng_state: bool, context_fn: Any) -> Any:
    """Call torch's checkpoint with the same policy: Dynamo traces it as a higher-order op, without a graph break."""
    contexts = context_fn if keep is None else torch_contexts(keep)
    if contexts is None:
        return torchs.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs)
    return torchs.checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, context_fn=contexts, **kwargs
    )
