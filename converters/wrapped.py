"""What training programs put around weights: prefixes of keys, and dictionaries in dictionaries."""

from collections import Counter

from converters import layouts, lightwam, rules

# Parts that wrappers (DDP, torch.compile, FSDP, activation checkpoints, DeepSpeed) put into keys,
# at the front or in the middle. No table of ours has a part of such a name.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS += ("_forward_module", "_fpw_module")
_DEEPEST = 4  # dictionaries in dictionaries in a .pt file


def unwrap(source):
    """Returns (the tensors under the names of a known layout, the prefix that stood before all).

    Leading prefixes (`module.`, `model.diffusion_model.`, whatever all keys share before names that
    we know) and wrappers' parts are left out. The prefix is "" where the way back is not one
    prefix for all.

    Raises:
      ValueError: only some of the keys have the prefix, or two become the same.
    """
    names = {key: _plain(key) for key in source.entries}
    start = _before_known(list(names.values()), source.name)
    names = {key: name.removeprefix(start) for key, name in names.items()}
    if all(key == name for key, name in names.items()):
        return source, ""
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        both = [key for key, name in names.items() if name == twice[0]]
        raise ValueError(
            f"{source.name} holds {twice[0]} twice, as {' and as '.join(both)}: keep one of the "
            "two sets of weights"
        )
    before = {key[: len(key) - len(name)] for key, name in names.items() if key.endswith(name)}
    whole = len(before) == 1 and all(map(str.endswith, names, names.values()))
    return rules.Renamed(source, names), before.pop() if whole else ""


def _plain(key):
    """A key without the parts that wrappers put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _before_known(keys, name):
    """What stands before the keys of a known layout, the same for all of them; "" for nothing."""
    there = set(keys)
    for layout in layouts.LAYOUTS:
        if layout.signature in there:
            return ""
        ends = [key for key in keys if key.endswith("." + layout.signature)]
        for start in {key.removesuffix(layout.signature) for key in ends}:
            under = [key.removeprefix(start) for key in keys if key.startswith(start)]
            if len(under) == len(keys):
                return start
            if len(under) > 4 and 2 * rules.known(layout.table, under) > len(under):
                others = [key for key in keys if not key.startswith(start)]
                raise ValueError(
                    f"{name}: {len(under)} of its {len(keys)} keys begin with the prefix "
                    f"{start!r} and are those of a {layout.kind} ({layout.name} names); the "
                    f"others ({rules.some_of(others, 3)}) belong to something else: write those "
                    f"under {start!r} to a file of their own"
                )
    return ""


def recognised(keys):
    """Whether keys hold those of a known layout, with or without anything before them."""
    names = [_plain(key) for key in keys if isinstance(key, str)]
    ends = tuple("." + layout.signature for layout in layouts.LAYOUTS)
    return any(("." + name).endswith(ends) for name in names)


def tensors_of(content, part=""):
    """The weights in what a .pt file holds -> ({key: tensor}, where they lie in it: "" at the top).

    Args:
      content: dictionary, of tensors or of dictionaries. part: which, where several hold weights.

    Raises:
      ValueError: several sets of weights and no `part`, or no such part.
    """
    there = {".".join(path): found for path, found in _nests(content)}
    known = {place: found for place, found in there.items() if recognised(found)}
    if part:
        if part not in there:
            raise ValueError(f"--part {part}: tensors lie under {_listed(there)}")
        return there[part], part
    if len(known) > 1:
        raise ValueError(
            f"{len(known)} sets of weights: {_listed(known)}; say with --part which (`ema` is "
            "usually the one to deploy)"
        )
    if known:
        place = next(iter(known))
        return known[place], place
    if len(there) > 1 and "" not in there:
        raise ValueError(f"tensors lie under {_listed(there)}, and none of them has known keys")
    return next(iter(there.items()))[::-1] if there else (content, "")


def sections_of(content, part=""):
    """As `tensors_of` for a Light-WAM checkpoint -> ({flat key: tensor}, {the rest}).

    Its sections may lie in another dictionary, or the file be flat.
    """
    if part:
        tensors, place = tensors_of(content, part)
        return tensors, {"part": place}
    for path, found in _dictionaries(content):
        if any(name in found for name in (*lightwam.SECTIONS, "dit")):
            flat, rest = lightwam.flatten_checkpoint(found)
            return flat, rest | ({"part": ".".join(path)} if path else {})
    signature = layouts.LAYOUTS[0].signature
    if any(str(key).endswith(signature) for _, found in _nests(content) for key in found):
        tensors, place = tensors_of(content)
        return tensors, {"part": place} if place else {}
    return lightwam.flatten_checkpoint(content)  # which says what is missing


def _dictionaries(content, path=()):
    yield path, content
    for key, value in content.items():
        if isinstance(value, dict) and len(path) < _DEEPEST:
            yield from _dictionaries(value, (*path, str(key)))


def _nests(content, path=()):
    """Yields (where, {key: tensor}) for each dictionary that holds tensors."""
    tensors = {key: x for key, x in content.items() if hasattr(x, "detach")}
    if tensors:
        yield path, {str(key): x for key, x in tensors.items()}
    for key, value in content.items():
        if isinstance(value, dict) and len(path) < _DEEPEST:
            yield from _nests(value, (*path, str(key)))


def _listed(places):
    shown = [
        f"{place or 'the top level'} ({len(found)} tensors)" for place, found in places.items()
    ]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def told(origin):
    """The line that says what was left out of keys and where tensors lay, or None.

    Args:
      origin: "source" of a converted checkpoint's meta.
    """
    said = []
    if origin.get("part"):
        said.append(f"the weights lie under {origin['part']!r}")
    if origin.get("prefix"):
        said.append(f"the prefix {origin['prefix']!r} of all keys is left out (export restores it)")
    elif origin.get("unwrapped"):
        said.append("wrappers' parts of keys are left out (export writes plain keys)")
    return "; ".join(said) or None
