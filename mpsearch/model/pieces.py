"""Running a language model whose weights are there one piece at a time.

The model's own code runs each time from the beginning, but only the modules of the piece compute. What came before
answers from memory, and what comes after is not begun, so a piece gets exactly the masks, positions and hidden states
that it gets in the whole model. Earlier blocks than the last answer NaN: a model that reads them is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.model.activation_store import ActivationStore, mapped
from mpsearch.model.answers import (
    answering,
    first,
    get,
    hidden_place,
    noting,
    one_by_one,
    put,
    removed,
    tensors,
    with_first,
)
from mpsearch.model.digest import digest_of
from mpsearch.model.model import Batch, Model

#: Quantisation errors of a piece are kept up to this many bytes.
DELTA_BYTES = 2**28


class _Stop(Exception):
    """Ends a forward pass where a piece ends; carries what it gave."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Tap(torch.autograd.Function):
    """Hands a tensor on, and shows the gradient that comes back for it.

    Depends on the piece's weights in name only: autograd goes no further back than to what gradients are asked for.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, see: Callable[[Tensor], None], *weights: Tensor) -> Tensor:
        ctx.see, ctx.weights = see, len(weights)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.see(gradient)
        return (gradient, None, *[None] * ctx.weights)


class Inject(torch.autograd.Function):
    """Gives what later pieces made of a tensor, and on the way back the gradient that they sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, answer: Tensor, gradients: Callable[[], Tensor]) -> Tensor:
        ctx.gradients = gradients
        return answer.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.gradients(), None, None


class Piece(Model):
    """A part of a model that estimators take for a model.

    Its batches are those of the whole model; its logits are the output of the part, or, where gradients are taken, the
    whole model's logits, from which the gradient comes back as it does in the whole model.

    Attributes:
        blocks: the blocks that it holds; a part outside of the blocks has none.
        keep_bytes: quantisation errors are kept up to this many bytes.
    """

    def __init__(self, module: nn.Module, name: str, run: Callable[[Batch], Tensor], blocks: Sequence[nn.Module]):
        """Take the loaded modules, under their names in the whole model."""
        super().__init__(
            module, logits=lambda module, batch: run(batch), name=name, digest=name, tokens=True, owned=True
        )
        self.blocks = tuple(blocks)
        sizes = [4 * x.numel() for x in module.parameters()]
        # What an estimator makes of the largest layer for a while takes the room of what could be kept of it.
        self.keep_bytes = min(DELTA_BYTES, sum(sizes) - max(sizes, default=0))

    def close(self) -> None:
        """Let go of all that estimators remembered, which refers to the piece and would outlive it for a while."""
        self._memo.clear()


class Runner:
    """Runs the pieces of a model on batches, in order, and remembers what each gives.

    A batch is known by its content. Gradients of a pass are known by piece, batch, number of the pass over that batch
    and number of the backward pass through it: an estimator asks every piece in the same order.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], store: ActivationStore) -> None:
        self.module = module
        self.blocks = list(blocks)
        self.store = store
        self.before: list[nn.Module] = []
        self.remembering = False
        self._passes: dict[str, int] = {}
        self._weights: list[nn.Parameter] = []

    def begin(self, weights: Sequence[nn.Parameter]) -> None:
        """Count passes from the beginning, for a piece of these weights."""
        self._passes.clear()
        self._weights = list(weights)

    def start(self, batch: Batch) -> Tensor:
        """Run what comes before the blocks."""
        key = digest_of(batch)
        given: dict[nn.Module, list[Any]] = {}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            given.setdefault(module, []).append(output)

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = hidden_place(args, kwargs)
            self._only_hidden(args, kwargs, place)
            raise _Stop(get(args, kwargs, place))

        hooks = [module.register_forward_hook(keep) for module in self.before]
        hooks.append(self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True))
        with removed(hooks):
            found: Tensor = self._run(batch)
        if self.remembering and ("before", 0, key) not in self.store:
            for number, module in enumerate(self.before):
                self.store["before", number, key] = given[module]
        return self._injected(found, 0, key) if torch.is_grad_enabled() else found

    def block(self, number: int, batch: Batch) -> Tensor:
        """Run a block."""
        key = digest_of(batch)
        answered: list[nn.Module] = []
        gradients = torch.is_grad_enabled()
        tap = self._tap(number, key) if gradients else None

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if answered != self.blocks[:number]:
                raise self._unusual("its blocks do not run once each, in order")
            place = hidden_place(args, kwargs)
            self._only_hidden(args, kwargs, place)
            return put(args, kwargs, place, tap) if tap else None

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            raise _Stop(output)

        block = self.blocks[number]
        hooks = [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.register_forward_hook(leave),
        ]
        with removed(hooks), answering(self._answers(number, key, answered)):
            output = self._run(batch)
        found = first(output)
        if self.remembering and ("block", number, key) not in self.store:
            if not bool(torch.isfinite(found).all()):
                raise InputError(
                    "E510",
                    f"the original model already gives values that are not finite (block {number})",
                    advice="check the checkpoint and its number type",
                )
            self.store["block", number, key] = output
        return self._injected(found, number + 1, key) if gradients else found

    def end(self, batch: Batch) -> Tensor:
        """Run what comes after the blocks."""
        key = digest_of(batch)
        tap = self._tap(len(self.blocks), key) if torch.is_grad_enabled() else None
        answered: list[nn.Module] = []
        logits = self._finish(batch, key, self._answers(len(self.blocks), key, answered), answered, tap)
        if torch.is_grad_enabled() and ("logits", key) not in self.store:
            self.store["logits", key] = logits
        return logits

    def ends(self, batch: Batch) -> Tensor:
        """Run what comes before and after the blocks, which share weights, in one pass."""
        key = digest_of(batch)
        entered: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = hidden_place(args, kwargs)
            self._only_hidden(args, kwargs, place)
            entered.append(get(args, kwargs, place))

        bridge = None
        if torch.is_grad_enabled():
            gradients = self._gradients(0, key)

            def bridge(x: Tensor) -> Tensor:
                found: Tensor = Inject.apply(entered[0], x, gradients)  # type: ignore[no-untyped-call]
                return found

        answered: list[nn.Module] = []
        answers = self._answers(len(self.blocks), key, answered)
        for module in self.before:
            del answers[module]
        with removed([self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]):
            return self._finish(batch, key, answers, answered, bridge)

    def _finish(
        self,
        batch: Batch,
        key: str,
        answers: dict[nn.Module, Callable[..., Any]],
        answered: list[nn.Module],
        change: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        if change:
            plain, last = answers[self.blocks[-1]], self.blocks[-1]
            answers[last] = lambda *args, **kwargs: with_first(plain(*args, **kwargs), change)
        with answering(answers):
            logits: Tensor = self.module(**batch, use_cache=False).logits
        if answered != self.blocks:
            raise self._unusual("its blocks do not run once each, in order")
        if not bool(torch.isfinite(logits.detach()).all()):
            raise self._unusual("its head reads the outputs of more blocks than the last, or gives no finite values")
        return logits

    def _run(self, batch: Batch) -> Any:
        try:
            self.module(**batch, use_cache=False)
        except _Stop as stopped:
            return stopped.output
        raise self._unusual("a block was not called")

    def _answers(self, stage: int, key: str, answered: list[nn.Module]) -> dict[nn.Module, Callable[..., Any]]:
        """What modules before a stage answer: the last block what it gave, those before it NaN."""
        answers = {module: one_by_one(self._known("before", number, key)) for number, module in enumerate(self.before)}
        if stage:
            last = self._known("block", stage - 1, key)
            nothing = mapped(last, lambda x: x.new_full((), torch.nan).expand(x.shape) if x.is_floating_point() else x)
            for block in self.blocks[: stage - 1]:
                answers[block] = noting(block, nothing, answered)
            answers[self.blocks[stage - 1]] = noting(self.blocks[stage - 1], last, answered)
        return answers

    def _known(self, *key: Any) -> Any:
        if key not in self.store:
            raise InputError("E506", "the estimator ran other data than it was given", advice="score in memory")
        return self.store[key]

    def _only_hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str) -> None:
        """Check that nothing enters a block that an unknown weight or an earlier block has made."""
        others = [x for i, x in enumerate(args) if i != place] + [x for name, x in kwargs.items() if name != place]
        for x in tensors(others):
            if x.requires_grad:
                raise self._unusual("its blocks read more of its weights' work than the hidden state")
            if x.is_floating_point() and bool(torch.isnan(x).any()):
                raise self._unusual("its blocks read more than the output of the block before")

    def _unusual(self, reason: str) -> InputError:
        name = type(self.module).__name__
        return InputError("E506", f"{name} cannot be streamed: {reason}", advice="score it in memory")

    def _tap(self, stage: int, key: str) -> Callable[[Tensor], Tensor]:
        number = self._passes[key] = self._passes.get(key, -1) + 1
        backward = iter(range(2**62))

        def see(gradient: Tensor) -> None:
            self.store["gradient", stage, key, number, next(backward)] = gradient

        def tap(x: Tensor) -> Tensor:
            found: Tensor = Tap.apply(x, see, *self._weights)  # type: ignore[no-untyped-call]
            return found

        return tap

    def _injected(self, found: Tensor, stage: int, key: str) -> Tensor:
        # A block counts its passes where it is entered; what comes before the blocks is not entered.
        number = self._passes.get(key, 0) if stage else None
        logits, gradients = self._known("logits", key), self._gradients(stage, key, number)
        output: Tensor = Inject.apply(found, logits, gradients)  # type: ignore[no-untyped-call]
        return output

    def _gradients(self, stage: int, key: str, number: int | None = None) -> Callable[[], Tensor]:
        """Gradients that came back at a stage in one pass over a batch, in order."""
        if number is None:
            number = self._passes[key] = self._passes.get(key, -1) + 1
        backward = iter(range(2**62))

        def gradient() -> Tensor:
            found: Tensor = self._known("gradient", stage, key, number, next(backward))
            return found.clone()

        return gradient
