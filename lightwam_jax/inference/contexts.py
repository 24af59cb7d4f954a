"""Instructions as the model reads them: each is encoded once and stays on the device."""

import functools
import threading

import jax
import jax.numpy as jnp

KEPT_TEXTS = 256  # encoded instructions in memory; of umT5 each takes 1 MiB
KEPT = 32  # instructions on the device; of the full-size deployed policy each takes 19 MiB


class Contexts:
    """Contexts of batches of instructions.

    A context is a dict of arrays. One instruction's is what `prepare` returns; a batch's has them
    side by side, and is made anew only where the instructions differ from those of the last call.
    """

    def __init__(self, encode, prepare, axes):
        """Args:

        encode: function (instructions) -> (rows [n,L,dim], mask bool [n,L]), on the host.
        prepare: pure function (rows [1,L,dim], mask [1,L]) -> context.
        axes: {name: axis of the batch} of a context's arrays.
        """
        self._encode, self._prepare, self._axes = encode, prepare, axes
        self._texts = {}  # instruction -> (rows, mask), each with an axis of length 1 in front
        self._lock = threading.Lock()  # of _texts, in which the latest is the last
        self._ready = {}  # instruction -> context, those of the last KEPT
        self._last = (), None  # instructions of the last batch, its context
        self._join = jax.jit(functools.partial(jax.tree.map, _side_by_side, axes))

    def prepared_by(self, prepare):
        """Returns contexts of other weights: the same texts, nothing else kept."""
        other = Contexts(self._encode, prepare, self._axes)
        other._texts, other._lock, other._join = self._texts, self._lock, self._join
        return other

    def encoded_by(self, encode):
        """Returns contexts of the same weights whose texts are encoded otherwise."""
        return Contexts(encode, self._prepare, self._axes)

    def __call__(self, instructions, rows):
        """Returns the context of `rows` instructions: those given, then the first repeated."""
        wanted = (*instructions, *instructions[:1] * (rows - len(instructions)))
        last = self._last
        if wanted != last[0]:
            self.add(wanted)
            found = {text: self._one(text) for text in dict.fromkeys(wanted)}
            parts = [found[text] for text in wanted]
            # One assignment and no second reading: another thread may ask in between.
            self._last = last = wanted, parts[0] if rows == 1 else self._join(*parts)
        return last[1]

    def __contains__(self, instruction):
        """Whether it is encoded already."""
        return instruction in self._texts

    def add(self, instructions):
        """Encodes those that are new; another thread may ask for others meanwhile."""
        new = [text for text in dict.fromkeys(instructions) if text not in self._texts]
        if new:  # all at once: a large encoder is read from disk for them
            rows, masks = self._encode(new)
            self._keep({text: (rows[i : i + 1], masks[i : i + 1]) for i, text in enumerate(new)})

    def _keep(self, encoded):
        with self._lock:
            self._texts.update(encoded)
            while len(self._texts) > KEPT_TEXTS:
                del self._texts[next(iter(self._texts))]

    def text(self, instruction):
        """Returns (rows [1,L,dim], mask bool [1,L]) of an instruction, encoded if it is new."""
        with self._lock:
            encoded = self._texts.pop(instruction, None)
            if encoded is not None:
                self._texts[instruction] = encoded  # the latest is the last
        if encoded is None:  # or dropped since it was added
            encoded = self._encode([instruction])
            self._keep({instruction: encoded})
        return encoded

    def _one(self, text):
        context = self._ready.pop(text, None)
        if context is None:
            context = self._prepare(*self.text(text))
        self._ready[text] = context  # the latest is the last
        while len(self._ready) > KEPT:
            del self._ready[next(iter(self._ready))]
        return context


def _side_by_side(axis, *parts):
    return jnp.concatenate(parts, axis)
