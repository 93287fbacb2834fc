"""One cache of a session: its layers as transformers sees them, and the facts that cross layers."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from elision.errors import Closed, Conflict, UnsupportedTarget
from elision.kv.store import LayerStore, MapBatch

if TYPE_CHECKING:
    from elision.kv.engine import KVApplied

_numbers = itertools.count()


class Book:
    """What one conversation's cache knows beyond its layers; copied with the cache, shared with nothing.

    Attributes:
        stores: the managed layers.
        prompt_until: tokens seen at which the announced prompt ends; None if none was announced.
        recording: whether tokens may be taken back after a forward (assisted decoding), so rules wait.
        state: what a method remembers across layers (tensors have the batch in front).
        broken: a forward broke off and left layers unequal; the cache cannot be used again.
        padding: padding tokens that each row has seen, [B]; None if there were none.
        images: which tokens of prompts stand for a part of an image, [B, <= seen]; None where the model has no images.
    """

    def __init__(self, session: KVApplied, layers: list[int]) -> None:
        self.session = session
        self.number = next(_numbers)
        self.stores = {layer: LayerStore(layer) for layer in layers}
        self.prompt_until: int | None = None
        self.recording = False
        self.broken = False
        self.padding: Tensor | None = None
        self.images: Tensor | None = None
        self.state: dict[str, Any] = {}
        self._scratch: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Book:
        clone = object.__new__(Book)
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            clone.__dict__[name] = value if name == "session" else copy.deepcopy(value, memo)
        clone.number, clone._scratch = next(_numbers), {}
        return clone

    @property
    def seen(self) -> int:
        """Tokens that passed, padding included."""
        return next(iter(self.stores.values())).seen

    @property
    def intact(self) -> bool:
        """Whether no layer lost or moved anything."""
        return all(store.intact for store in self.stores.values())

    @property
    def nbytes(self) -> int:
        """Bytes held by all managed layers."""
        return sum(store.nbytes for store in self.stores.values())

    def check_device(self, k: Tensor, layer: int) -> None:
        """Raise if a layer computes its keys elsewhere than where the cache holds tokens: layers share facts."""
        held = next((store.dense["k"].device for store in self.stores.values() if "k" in store.dense), k.device)
        if held != k.device:
            raise UnsupportedTarget(
                f"layer {layer} computes on {k.device}, but the cache holds tokens on {held}: a compressed cache lies "
                "on one device; put the whole model there, and start with a cache of that device"
            )

    def see_images(self, new: Tensor, first: int) -> None:
        """Note which tokens of a prompt, [B, m] from sequence index `first` on, stand for a part of an image."""
        before = new.new_zeros(len(new), first)
        if self.images is not None:
            known = self.images[:, :first]
            before[:, : known.shape[1]] = known
        self.images = torch.cat([before, new], 1)

    def image_slots(self, store: LayerStore) -> Tensor | None:
        """Which slots of a layer stand for a part of an image, [B, G or 1, n]; None where the model has no images."""
        if self.images is None:
            return None
        places = store.positions().long()
        known = self.images[:, None].expand(-1, places.shape[1], -1)
        return known.gather(2, places.clamp(max=known.shape[2] - 1)) & (places < known.shape[2])

    def scratch(self, name: str, like: Tensor, n: int) -> Tensor:
        """A buffer [B, G, n, D] that all layers share; what it held is lost."""
        b, g, _, d = like.shape
        size = b * g * n * d
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._scratch[name] = like.new_empty(size + size // 8)
        return buffer[:size].view(b, g, n, d)

    def map_batch(self, f: MapBatch) -> None:
        """Apply `f` to the rows of everything that crosses layers."""
        self.padding = None if self.padding is None else f(self.padding)
        self.images = None if self.images is None else f(self.images)
        self.state = {k: f(v) if isinstance(v, Tensor) and v.ndim else v for k, v in self.state.items()}

    def settle(self) -> None:
        """Let the rules act on what was held back while the cache was recording."""
        held = [(store, store.pending) for store in self.stores.values() if store.pending is not None]
        for store, call in held:
            store.pending = None
            self.session.act(call)


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer of transformers whose tokens lie in a `LayerStore`.

    Tokens seen and tokens stored are different numbers: `get_seq_length` is the first, so that positions stay true.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, book: Book, index: int) -> None:
        super().__init__()
        self.book = book
        self.store = book.stores[index]

    @property
    def keys(self) -> Tensor | None:
        """Keys of the dense slots, [B, G, n, D]."""
        return self.store.dense.get("k")

    @keys.setter
    def keys(self, value: Any) -> None:
        assert value is None

    @property
    def values(self) -> Tensor | None:
        """Values of the dense slots, [B, G, n, D]."""
        return self.store.dense.get("v")

    @values.setter
    def values(self, value: Any) -> None:
        assert value is None

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first token."""
        return -1 if self.keys is None else len(self.keys)

    @property
    def record_past(self) -> bool:
        """Whether rules wait because tokens may be taken back."""
        return self.book.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.book.recording = value

    def activate_past_recording(self) -> None:
        """Hold rules back until the next forward, so that `crop` finds every token it may take back."""
        self.book.recording = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: buffers come with the first tokens."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new tokens through: the seam stores them where queries and masks are known."""
        session = self.book.session
        if not session.forwarding(self.book):
            if session.closed:
                raise Closed(
                    f"a cache compressed by {session.names} was used after remove(): its layers hold a part of the "
                    "tokens only; start with a new cache"
                )
            raise Conflict(
                f"a cache of {session.names} on {session.target} was used with another model: each model needs its own"
            )
        self.is_initialized = True
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.store.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the model's mask has to cover: all, or once tokens left, the new ones."""
        if self.book.intact:
            return self.store.seen + query_length, 0
        return query_length, self.store.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back (a number below zero, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        count, store = -tokens_to_remove, self.store
        if store.pending is not None:
            store.pending = store.pending.head(store.pending.m - count) if count < store.pending.m else None
        store.crop(count)

    def reset(self) -> None:
        """Forget everything."""
        index = self.store.layer
        self.store = self.book.stores[index] = LayerStore(index)
        book = self.book
        book.prompt_until, book.recording, book.broken, book.padding = None, False, False, None
        book.state.clear()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the beams that survived."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows."""
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """Not supported: `adopt` refuses offloaded caches."""

    def prefetch(self) -> None:
        """Not supported: `adopt` refuses offloaded caches."""

    def _map(self, f: Any) -> None:
        if self.store.seen:
            self.store.map_batch(f)
        if self.store is next(iter(self.book.stores.values())):
            self.book.map_batch(f)


def adopt(cache: Any, session: KVApplied, layers: list[int], valid: Tensor | None) -> Book:
    """Put our layers into `cache` in place of plain full-attention ones, or find those that are there.

    Args:
        cache: what arrived as `past_key_values`.
        session: who manages it.
        layers: the indices to manage.
        valid: which of the tokens it already holds are real, [B, seen]; None if all are.

    Raises:
        UnsupportedTarget: a static, quantised, offloaded or encoder–decoder cache.
        Conflict: a cache of another session.
    """
    if type(cache) not in (Cache, DynamicCache) and not isinstance(cache, DynamicCache):
        raise UnsupportedTarget(
            f"past_key_values is a {type(cache).__name__}: pass a DynamicCache, run.cache() or nothing; static, "
            "quantised and encoder–decoder caches keep their own books"
        )
    if cache.offloading:
        raise UnsupportedTarget("an offloaded cache cannot be compressed: pass a DynamicCache without offloading")
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= max(layers):
        cache.layers.append(cache.layer_class_to_replicate())
    mine = cache.layers[layers[0]] if layers[0] < len(cache.layers) else None
    if isinstance(mine, Layer):
        if mine.book.session is not session:
            other = mine.book.session
            raise Conflict(
                f"the cache belongs to {other.names} on {other.target}: a compressed cache lives and ends with its "
                "session; start with a new one"
            )
        return mine.book
    book, ours = Book(session, layers), {}
    for index in layers:
        old = cache.layers[index] if index < len(cache.layers) else None
        if old is None or type(old) is not DynamicLayer:
            raise UnsupportedTarget(
                f"layer {index} of the cache is a {type(old).__name__}, not a plain growing one: make it with "
                "run.cache() or DynamicCache(config=model.config)"
            )
        layer = Layer(book, index)
        if old.keys is not None and old.keys.numel():
            if session.method.raw():
                raise UnsupportedTarget(
                    f"{session.names} keeps unrotated keys, but the cache holds {old.keys.shape[-2]} rotated ones: "
                    "start with run.cache(), or use the mode of the method that keeps rotated keys (rolling=False)"
                )
            held = None if valid is None else valid[:, : old.keys.shape[-2]]
            if held is not None and not bool(held.all()):
                book.padding = (~held).sum(1)
            else:
                held = None
            layer.store.append(old.keys, old.values, held)
            layer.is_initialized = True
        ours[index] = layer
    for index, layer in ours.items():  # all or none, so that a cache that is refused stays as it was
        book.recording |= bool(getattr(cache.layers[index], "record_past", False))
        cache.layers[index] = layer
    return book
