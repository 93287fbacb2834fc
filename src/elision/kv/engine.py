"""The engine: carries every managed attention call through store, mask, attention and rules."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from elision.errors import ElisionError, ElisionWarning, OptionError, UnsupportedTarget
from elision.hooks.taps import tap_call, tap_method
from elision.hooks.transformers import Attention, Host, Out, Seam
from elision.kv.attend import attend
from elision.kv.book import Book, adopt
from elision.kv.fit import check_profile
from elision.kv.method import KVHost, KVMethod
from elision.kv.parts import Call, Phase
from elision.kv.pseudo import check_pseudo, keep_all, observe, position_limit, without_pseudo
from elision.kv.report import KVReport, Ledger
from elision.session import Applied


@dataclass
class Forward:
    """One call of the decoder.

    Attributes:
        book: the cache it writes.
        m: tokens that enter, pseudo rows included.
        first: sequence index of the first of them.
        phase, starts, lengths, extra, drafts: as in `Call`.
        turn: tokens of the prompt from `first` on, also those of its later parts.
        valid: which of them are real, [B, m]; None if all are.
        masks: masks made so far in this forward, by number of stored slots.
        rotary: cos and sin of slot indices made so far, by number of slots.
        placed: the last slot indices that are not simply counted, with their cos and sin.
    """

    book: Book
    m: int
    first: int
    phase: Phase
    starts: bool
    valid: Tensor | None
    lengths: int | Tensor
    turn: int
    extra: int = 0
    drafts: int = 0
    masks: dict[int, Tensor] = field(default_factory=dict)
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    placed: tuple[Tensor, Tensor, Tensor] | None = None


class KVApplied(Applied):
    """A KV method at work on a transformers model.

    Use it around `model.generate(...)`, around plain `model(...)` calls, or with `past_key_values=run.cache()` for
    several conversations side by side. Apply it to the model whose `generate` you call: on its bare decoder, nothing
    tells where a prompt ends that arrives in parts, nor that drafts of assisted decoding may be taken back.
    `run.prompt(n)` tells plain loops that the next n tokens are one prompt, when it arrives in parts.
    """

    def __init__(
        self, target: Any, method: KVMethod, *, profile: Any = None, force: bool = False, shadow: bool = False
    ) -> None:
        super().__init__([method])
        self.method = method
        self.shadow = shadow
        self.host = Host.of(target)
        self.target = type(target).__name__
        self.layers = _managed(self.host)
        self.profile = check_profile(method, profile, self.host, force)
        module = self.host.attention[self.layers[0]]
        self.rules = tuple(method.rules(_describe(self.host, self.layers, module, self.profile)))
        self.pseudo = method.pseudo()
        check_pseudo(self.host, self.pseudo)
        self.ledger = Ledger(self.layers)
        self._forward: Forward | None = None
        self._announced: int | None = None
        self._books: weakref.WeakSet[Book] = weakref.WeakSet()
        self._signature = inspect.signature(type(self.host.decoder).forward)
        self._own(self.host.decoder)
        managed = {layer: self.host.attention[layer] for layer in self.layers}
        try:
            # a compiled model runs around the decoder; inside, shapes and stores change at every call
            around = torch.compiler.disable(self._decoder)  # type: ignore[no-untyped-call]
            self._seam = Seam(self.host, managed, around, self._attention, raw=method.raw())
        except BaseException:
            self.remove()
            raise
        self._taps.extend(self._seam.taps)
        self._ids: Tensor | None = None
        self._image = _image_token(target)
        if self._image is not None:
            self._taps.append(tap_call(target, self._whole))
        if hasattr(target, "generate"):
            self._generate_names = list(inspect.signature(target.generate).parameters)
            self._taps.append(tap_method(target, "generate", self._generate))

    @property
    def names(self) -> str:
        """The method, for messages."""
        return self.method.name

    @property
    def closed(self) -> bool:
        """Whether `remove` was called."""
        return self._closed

    def cache(self) -> DynamicCache:
        """A new cache for one conversation, to pass as `past_key_values`."""
        self._open("cache()")
        cache = DynamicCache(config=self.host.config)
        self._book(cache, None)
        return cache

    def prompt(self, tokens: int) -> None:
        """Tell that the next `tokens` tokens of the next cache used are one prompt, however many calls they take."""
        self._open("prompt()")
        if tokens < 1:
            raise OptionError(f"prompt({tokens}): a prompt has at least one token")
        self._announced = tokens

    def kept(self, cache: Any) -> dict[int, Tensor]:
        """Sequence indices of the tokens that every layer of `cache` holds: [B, G, n], -1 where a row holds fewer."""
        held: dict[int, Tensor] = {}
        for index, store in self._book(cache, None).stores.items():
            valid = store.valid()
            positions = store.positions().long()
            positions = positions.expand(-1, max(positions.shape[1], store.heads), -1)
            if valid is not None:
                positions = torch.where(valid, positions, -1)
            held[index] = positions.sort(-1).values
        return held

    def forwarding(self, book: Book) -> bool:
        """Whether a forward of our decoder is writing `book` right now."""
        return self._forward is not None and self._forward.book is book

    def report(self) -> KVReport:
        """What the caches held and lost so far."""
        for book in list(self._books):
            if self._forward is None and not book.broken:
                book.settle()
                self.ledger.take(book)
                self.ledger.look(book)
        return self.ledger.report([repr(m) for m in self.methods], self.target)

    def act(self, call: Call) -> None:
        """Let the rules see a call and act on it."""
        started = perf_counter()
        with torch.no_grad():  # what is held outlives the forward, so it must not hold its graph
            for rule in self.rules:
                rule.scorer.observe(call)
            if call.extra:
                call.store.crop(call.extra)
                call = call.head(call.m - call.extra)
                call.extra = 0
            for rule in self.rules:
                rule.act(call)
        self.ledger.seconds.deciding += perf_counter() - started

    # -- what is tapped ------------------------------------------------------------------------------------------------

    def _generate(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Around `generate`: our layers are in the cache before it starts, and it is known where the prompt ends."""
        kwargs = {**dict(zip(self._generate_names, args, strict=False)), **kwargs}
        given, own = kwargs.get("generation_config"), getattr(self.host.model, "generation_config", None)
        if _setting("use_cache", kwargs, given, own) is False or not self._live():
            return inner(**kwargs)
        kind = _setting("cache_implementation", kwargs, given, own)
        if kind not in (None, "dynamic", "hybrid"):  # transformers itself takes "hybrid" for dynamic
            raise UnsupportedTarget(
                f"cache_implementation={kind!r} makes a cache that {self.names} cannot manage: leave it out while the "
                "method is applied"
            )
        if kind is not None:
            kwargs["cache_implementation"] = None  # wins over the configurations
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = kwargs["past_key_values"] = self.cache()
            if getattr(given, "is_assistant", False):
                cache.activate_past_recording()  # as transformers does with the caches it makes for drafts
        book = self._book(cache, kwargs.get("attention_mask"))
        book.prompt_until = _prompt_end(kwargs, book.seen)
        try:
            return inner(**kwargs)
        finally:
            book.prompt_until = None
            if not book.broken and not self._closed:
                book.settle()
                book.recording = False
                self.ledger.take(book)
                self.ledger.look(book)

    def _whole(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Around the whole vision-language model, whose token ids tell which rows of the decoder are image parts."""
        outer, self._ids = self._ids, kwargs.get("input_ids", args[0] if args else None)
        try:
            return inner(*args, **kwargs)
        finally:
            self._ids = outer

    def _decoder(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(self._signature.parameters)[1 : len(args) + 1]
        kwargs = {**dict(zip(names, args, strict=True)), **kwargs}
        cache = kwargs.get("past_key_values")
        if not self._live() or (kwargs.get("inputs_embeds") is None and kwargs.get("input_ids") is None):
            return inner(**kwargs)  # the latter raises
        if cache is None:
            uses = kwargs.get("use_cache")
            if not (getattr(self.host.config, "use_cache", True) if uses is None else uses):
                return inner(**kwargs)  # nothing is kept, so there is nothing to compress
            cache = kwargs["past_key_values"] = self.cache()
        book = self._book(cache, kwargs.get("attention_mask"))
        if book.broken:
            raise ElisionError(
                "an earlier forward with this cache broke off, so its layers hold different tokens: start a new one"
            )
        book.settle()
        forward = self._enter(book, kwargs)
        started, outer = perf_counter(), self._forward
        self._forward = forward
        try:
            with keep_all(cache, forward.extra):
                out = inner(**kwargs)
        except BaseException:
            book.broken = True
            raise
        finally:
            self._forward = outer
        self.ledger.seconds.computing += perf_counter() - started
        self.ledger.forwards += 1
        self.ledger.take(book, newest=True)
        return without_pseudo(out, forward.m - forward.extra) if forward.extra else out

    def _enter(self, book: Book, kwargs: dict[str, Any]) -> Forward:
        tokens = kwargs.get("inputs_embeds")
        tokens = kwargs["input_ids"] if tokens is None else tokens
        m, first = tokens.shape[1], book.seen
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UnsupportedTarget(
                f"attention_mask is {'a dict' if isinstance(mask, dict) else f'{mask.ndim}-dimensional'}: a compressed "
                "cache needs the two-dimensional mask [batch, tokens] that says which tokens are padding"
            )
        if mask is not None and mask.shape[1] != first + m:
            raise UnsupportedTarget(
                f"attention_mask has {mask.shape[1]} columns for {first} tokens in the cache and {m} new ones: it has "
                "to cover all of them"
            )
        if self._announced is not None:
            book.prompt_until, self._announced = first + self._announced, None
        drafts = 0 if book.prompt_until is None else max(first + m - max(book.prompt_until, first), 0)
        until = book.prompt_until
        phase, starts = self._phase(book, first, m)
        if self._image is not None and self._ids is not None and phase != "step":
            book.see_images(self._ids.eq(self._image), first)
        turn = (until if phase == "prompt_chunk" and until else first + m - drafts) - first
        new = None if mask is None else mask[:, -m:].bool()
        if new is not None and bool(new.all()):
            new = None
        if new is not None:
            more = (~new).sum(1)
            book.padding = more if book.padding is None else book.padding + more
        seen = first + m
        lengths: int | Tensor = seen if book.padding is None else seen - book.padding
        forward = Forward(book, m, first, phase, starts, new, lengths, turn)
        forward.drafts = drafts if phase == "prompt_end" else 0
        if self.method.stored() and first and not book.intact:
            kwargs["position_ids"] = self._behind(forward, kwargs.get("position_ids"))
        if self.pseudo is not None and phase != "step":
            embed: Any = self.host.decoder.get_input_embeddings()  # type: ignore[operator]
            observe(self.pseudo, embed, forward, kwargs, position_limit(self.host.config))
        return forward

    def _behind(self, forward: Forward, places: Tensor | None) -> Tensor:
        """Positions of the new tokens counted on from what the first layer holds, in the shape of the model's own."""
        store, m = forward.book.stores[self.layers[0]], forward.m
        k, held = store.dense["k"], store.valid()
        start = torch.full((len(k), 1), store.n, device=k.device) if held is None else held[:, 0].sum(-1, keepdim=True)
        new = (
            torch.ones(len(k), m, dtype=torch.long, device=k.device) if forward.valid is None else forward.valid.long()
        )
        behind = (start + new.cumsum(-1) - 1).clamp(min=0)
        return behind if places is None or places.ndim == 2 else behind.expand(*places.shape[:-2], *behind.shape)

    def _phase(self, book: Book, first: int, m: int) -> tuple[Phase, bool]:
        """Which part of which phase these m tokens are, and whether a prompt starts with them."""
        state = book.state
        if book.prompt_until is not None and first < book.prompt_until:
            starts = not state.get("inside", False)
            ends = first + m >= book.prompt_until
            state["inside"] = not ends
            if ends:
                book.prompt_until = None
            return ("prompt_end" if ends else "prompt_chunk"), starts
        state["inside"] = False
        if first == 0 or (m > 1 and not book.recording):
            return "prompt_end", True
        return "step", False

    def _attention(self, att: Attention) -> Out:
        forward = self._forward
        if forward is None:
            q, k = (att.q, att.k) if att.rotary is None else att.rotate(att.q, att.k, *att.rotary)
            return att.run(q, k, att.v, att.mask)
        book, store = forward.book, forward.book.stores[att.layer]
        book.check_device(att.k, att.layer)
        if forward.starts and store.seen:
            self.method.before(store, forward.turn)
        store.append(att.k, att.v, forward.valid)
        q, keys, out, lse = attend(self, att, forward, store)
        if self.shadow:
            self.ledger.compare(store, att, out[0], forward.m - forward.extra)
        call = Call(
            store=store,
            book=book,
            q=q.detach(),
            keys=keys,
            first=forward.first,
            phase=forward.phase,
            starts=forward.starts,
            scale=att.scale,
            softcap=att.softcap,
            valid=forward.valid,
            lengths=forward.lengths,
            lse=lse,
            extra=forward.extra,
            drafts=forward.drafts,
        )
        if forward.phase != "step":  # a step fits into buffers that are counted after it
            self.ledger.high(book)
        if book.recording and not forward.extra:
            if store.tiers:
                call.keys = None  # they lie in a buffer that the next layer overwrites
            store.pending = call
        else:
            self.act(call)
        return out

    # -- bookkeeping ---------------------------------------------------------------------------------------------------

    def _book(self, cache: Any, mask: Any) -> Book:
        known = mask[:, :].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        book = adopt(cache, self, self._live(), known)
        self._books.add(book)
        return book

    def _live(self) -> list[int]:
        """The layers that run: fewer while a model that exits early writes its own drafts."""
        return [i for i in self.layers if i < self.host.config.num_hidden_layers]

    def _clear(self) -> None:
        self.ledger = Ledger(self.layers)
        self._announced = None

    def _leave(self) -> None:
        if hasattr(self, "_seam") and not self._seam.in_place and not self._broke_off:
            self.ledger.notes.append("something replaced a tap while the method was applied; it did not see all calls")

    def _finish(self) -> None:
        if hasattr(self, "_seam"):
            self._seam.remove()
        for book in self._books:
            if not book.broken:
                self.ledger.take(book)
        if not self._broke_off and hasattr(self, "_seam"):
            self._warn()

    def _warn(self) -> None:
        why = self.ledger.idle(self.method)
        if why:
            warnings.warn(f"{self.names} left nothing out: {why}", ElisionWarning, stacklevel=4)


def _managed(host: Host) -> list[int]:
    """The layers with plain full attention: those for which transformers would make a growing cache layer."""
    if getattr(host.config, "num_kv_shared_layers", 0):
        raise UnsupportedTarget(
            f"{type(host.decoder).__name__} shares keys and values between layers; such models are not handled"
        )
    kinds = DynamicCache(config=host.config).layers
    if kinds:
        layers = [i for i, layer in enumerate(kinds) if type(layer) is DynamicLayer and i in host.attention]
    else:
        layers = sorted(host.attention)
    for index in layers:
        if not getattr(host.attention[index], "is_causal", True):
            raise UnsupportedTarget(
                f"{type(host.attention[index]).__name__} of layer {index} is not causal: only decoders with causal "
                "self-attention have a cache to compress"
            )
    if not layers:
        raise UnsupportedTarget(
            f"{type(host.decoder).__name__} has no full-attention layer: sliding-window and linear layers already hold "
            "a bounded state"
        )
    return layers


def _describe(host: Host, layers: list[int], module: nn.Module, profile: Any) -> KVHost:
    config = host.config
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    return KVHost(tuple(layers), heads, groups, profile, config)


def _image_token(target: Any) -> int | None:
    """The id that stands for a part of an image in the prompts of a vision-language model."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(found := getattr(target.config, name, None), int):
            return found
    return None


def _setting(name: str, kwargs: dict[str, Any], *configs: Any) -> Any:
    """An option of `generate`: from its arguments, else from the first of its configurations that has it."""
    if name in kwargs:
        return kwargs[name]
    return next((value for c in configs if (value := getattr(c, name, None)) is not None), None)


def _prompt_end(kwargs: dict[str, Any], past: int) -> int | None:
    """Tokens seen when the prompt of this `generate` call is through, from the sizes of its arguments."""
    embeds = kwargs.get("inputs_embeds")
    ids = kwargs.get("input_ids", kwargs.get("inputs"))
    if embeds is not None:
        return int(embeds.shape[1])
    if not isinstance(ids, Tensor):
        return None
    length, mask = int(ids.shape[1]), kwargs.get("attention_mask")
    only_new = mask is not None and past and mask.shape[1] == past + length
    return past + length if only_new else length
