"""What holds in one context alone, a thread or an asyncio task (PEP 567), while others see the model as it is.

Draws, other adapters, replaced parts and hooks of a prediction are such. Two things are the module's own and can't be:
train and eval mode, which `eval_mode` shares between predictions, and PEFT's ``set_adapter``.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from threading import Lock, get_ident, local
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
States = Mapping[Any, Any]
_NONE: States = MappingProxyType({})


class _OfThread(local):
    """The same as ``_STATES`` by threads: torch.compile can read it, and no ContextVar."""

    def __init__(self) -> None:
        self.states: States = _NONE


_STATES: ContextVar[States] = ContextVar("bloblora", default=_NONE)
_TRACED = _OfThread()
_ENTERED: dict[int, tuple[int, States]] = {}
"""All that is in force anywhere, in the order in which it was entered, with its thread's number."""

TOKENIZING = Lock()
"""Truncation is a state of a tokenizer, which two calls with different ones would share."""

_LOCK = Lock()
_REPLACED: Counter[nn.Module] = Counter()
"""Modules for which some contexts have another forward, and how many."""
_PREDICTING: Counter[nn.Module] = Counter()
"""Modules in train mode that are in eval mode for some predictions, and how many."""


def unwrapped(model: nn.Module) -> Any:
    """A model without what ``torch.compile`` or a wrapper for several processes or devices puts around it."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


@contextmanager
def in_context(states: States) -> Iterator[None]:
    """The state of each owner is in force inside, in this context."""
    token = _STATES.set({**_STATES.get(), **states})
    before, _TRACED.states = _TRACED.states, _STATES.get()
    _ENTERED[id(token)] = get_ident(), states
    try:
        yield
    finally:
        del _ENTERED[id(token)]
        _TRACED.states = before
        _STATES.reset(token)


def state_of(owner: Any) -> Any:
    """What is in force for an owner in this context, or None.

    On a GPU, autograd's own thread computes activations again for gradient checkpointing. It has no context, and sees
    what the one thread has that has a state of this owner.

    Raises:
        RuntimeError: there are several such threads.
    """
    if torch.compiler.is_compiling():
        return _TRACED.states.get(owner)
    states = _STATES.get()
    if not states and _ENTERED and torch._C._current_graph_task_id() >= 0:
        found = {thread: states[owner] for thread, states in [*_ENTERED.values()] if owner in states}
        if len(found) > 1:
            raise RuntimeError("a backward recomputes a forward for which several threads have draws in force")
        return next(iter(found.values()), None)
    return states.get(owner)


@contextmanager
def replaced(stand_ins: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """In this context a call of a module is one of its stand-in, a function or a module."""
    with _LOCK:
        for module in stand_ins:
            if not _REPLACED[module]:  # accelerate may have put a forward there
                module.forward = partial(_forward, module, vars(module).get("forward"))
            _REPLACED[module] += 1
    try:
        with in_context(stand_ins):
            yield
    finally:
        with _LOCK:
            for module in stand_ins:
                _REPLACED[module] -= 1
                if _REPLACED[module]:
                    continue
                del _REPLACED[module]
                own = module.forward.args[1]  # type: ignore[attr-defined]
                del module.forward
                if own is not None:
                    module.forward = own


def standing_for(module: Module) -> Module:
    """The module that stands in for one in this context, or itself."""
    stand_in = state_of(module)
    return module if stand_in is None else stand_in


def changed(module: Module, **attributes: Any) -> Module:
    """A stand-in of the same parts with some other attributes."""
    twin = copy.copy(module)
    vars(twin).pop("forward", None)
    vars(twin).update(attributes)
    return twin


@contextmanager
def hooked(hooks: Iterable[tuple[Callable[[Any], Any], Callable[..., Any]]]) -> Iterator[None]:
    """Hooks that act in this context, each with the method of a module that registers it."""
    owner = object()

    def here(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: hook(*arguments) if state_of(owner) else None

    handles = [register(here(hook)) for register, hook in hooks]
    try:
        with in_context({owner: True}):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; then each module is as it was, also in a model of which a part is frozen in eval mode.

    Where predictions of several threads overlap, the modules go back to train mode at the end of the last.
    """
    _guard_forks()
    with _LOCK:
        held = [module for module in model.modules() if module.training or module in _PREDICTING]
        _PREDICTING.update(held)
        model.eval()
    try:
        yield
    finally:
        with _LOCK:
            _PREDICTING.subtract(held)
            for module in held:
                if not _PREDICTING[module]:
                    del _PREDICTING[module]
                    module.training = True


def _forward(module: nn.Module, own: Callable[..., Any] | None, *arguments: Any, **options: Any) -> Any:
    """A call of a module for which a context has a stand-in."""
    stand_in = state_of(module)
    if isinstance(stand_in, nn.Module):
        return type(stand_in).forward(stand_in, *arguments, **options)
    if stand_in is None:
        stand_in = own or partial(type(module).forward, module)
    return stand_in(*arguments, **options)


@cache
def _guard_forks() -> None:
    """Once there were predictions, a forked child computes in one thread.

    It would wait for ever for the threads of its parent's OpenMP, which it hasn't.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def _unlock() -> None:
    """Threads that a forked child hasn't may have held them."""
    for lock in (TOKENIZING, _LOCK):
        if lock.locked():
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)
