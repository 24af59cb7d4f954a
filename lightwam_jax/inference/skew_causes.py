"""Why a server's actions differ from training's: found by making the usual mistakes here, too."""

import itertools
import typing

import numpy as np
from PIL import Image

from lightwam_jax import encoders
from lightwam_jax.data import actions as actions_lib
from lightwam_jax.encoders import base as encoders_base
from lightwam_jax.inference import safety, skew_mistakes

_FOUND, _NEAR = 0.95, 0.5  # share of a deviation that a mistake explains
_MOST = 8  # windows that mistakes are tried on
_EXACT = 1e-3  # relative, of numbers that were multiplied or moved


class Cause(typing.NamedTuple):
    """A likely cause.

    Attributes:
      stage: that it explains. name: in words.
      explained: share of the deviation that is gone once the mistake is made here, 0..1.
    """

    stage: str
    name: str
    explained: float

    def __str__(self):
        sure = "" if self.explained > _FOUND else f"perhaps ({100 * self.explained:.0f} %): "
        return f"{self.stage}: {sure}{self.name}"


class Search:
    """Tries mistakes on windows.

    Attributes:
      causes: [`Cause`] that were found.
    """

    def __init__(self, policy, deployed, windows):
        """Args: policy: `Policy`. deployed: its deployed form. windows: `Window`s."""
        self._policy, self._deployed, self._windows = policy, deployed, windows
        self._mistakes, self._templates, self.causes = skew_mistakes.every(windows), {}, []

    def of_stage(self, name, served):
        """Looks for the cause of a deviating input stage; adds at most one.

        Args:
          name: of the stage. served: `Served` with stages, one per window.
        """
        stages = [each.stages for each in served]
        find = {
            "raw frame": self._of_pictures,
            "canvas": self._of_canvas,
            "proprio": self._of_state,
            "context + mask": self._of_prompt,
        }
        if name in find:
            find[name](name, stages)

    def of_actions(self, served, trained):
        """Looks for the cause of deviating actions where nothing else is known."""
        chosen = range(min(_MOST, len(served)))
        target = np.stack([served[i].actions for i in chosen])
        scale = np.abs(self._policy.assets.action.scale)
        apart = lambda planned: float((np.abs(planned - target) * scale).max(axis=(1, 2)).mean())
        windows = [self._windows[i] for i in chosen]

        def distance(mistake):
            try:
                return apart(self._plan([mistake.apply(window) for window in windows]))
            except (FileNotFoundError, ValueError):  # the encoder is not here, or too many words
                return np.inf

        self._best("actions", self._mistakes, distance, apart(trained.physical[: len(chosen)]))

    def of_looks(self, came):
        """Looks for what makes pictures {camera: uint8 [h,w,3]} look most like the windows'.

        The pictures are of other moments, so only what changes their look at large can be found.
        """

        def distance(mistake):
            made = [mistake.apply(window).images for window in self._windows]
            return float(np.mean([_pixels(_small(a), _small(b)) for a, b in zip(made, came)]))

        wanted = ("red and blue", "pictures ", "cameras ")
        mistakes = [m for m in self._mistakes if m.name.startswith(wanted)]
        self._best("raw frame", mistakes, distance)

    # ---- one stage each ------------------------------------------------------------------------

    def _of_pictures(self, name, stages):
        came = [each["images"] for each in stages]
        states = np.stack([each["state"] for each in stages])
        sent = np.stack([window.moment().state for window in self._windows])
        late = "images" if np.array_equal(states, sent) else "time"  # pictures alone, or all of it
        mistakes = [m for m in self._mistakes if m.concerns in ("images", late)]
        for camera, image in came[0].items():  # another size says which one was sent
            if image.shape != self._windows[0].moment().images[camera].shape:
                size = image.shape[:2]
                mistakes = [skew_mistakes.resized(size, f, False) for f in skew_mistakes.FILTERS]
                break

        def distance(mistake):
            made = [mistake.apply(window).images for window in self._windows]
            return float(np.mean([_pixels(a, b) for a, b in zip(made, came)]))

        self._best(name, mistakes, distance)

    def _of_canvas(self, name, stages):
        came = np.stack([each["canvas"] for each in stages])

        def distance(mistake):
            made = [self._policy.canvas(mistake.apply(w).images) for w in self._windows]
            return float(np.abs(encoders_base.to_float(np.stack(made)) - came).mean())

        self._best(name, [m for m in self._mistakes if m.concerns == "images"], distance)

    def _of_state(self, name, stages):
        came = np.stack([each["state"] for each in stages])
        sent = np.stack([window.moment().state for window in self._windows])
        if np.abs(came - sent).max() <= _EXACT * np.abs(sent).max():
            proprio = np.stack([each["proprio"] for each in stages])
            assets, width = self._policy.assets, self._policy.config.model.proprio_dim
            wanted = actions_lib.pad(assets.state.normalize(sent), width)
            words = lines(wanted, proprio, "proprio")
            said = "other statistics of the state" + (f": {words}" if words else "")
            return self._add(name, said, 1.0 if words else 0.0)
        late = [m for m in self._mistakes if m.concerns in ("state", "time")]
        scale = np.abs(sent).max(axis=0) + 1e-6

        def distance(mistake):
            made = np.stack([mistake.apply(window).state for window in self._windows])
            return float((np.abs(made - came) / scale).mean())

        if self._best(name, late, distance) < _FOUND:
            words = _order(sent, came) or lines(sent, came, "state")
            if words:
                self._add(name, words, 1.0)

    def _of_prompt(self, name, stages):
        tasks = [window.moment().prompt for window in self._windows]
        for task, came in zip(tasks, (each["prompt"] for each in stages)):
            if came != task:
                # The template around an instruction, or another instruction.
                around = came.replace(task, "{task}") if task in came else ""
                said = (
                    f"another prompt template: {around!r}" if around else f"{came!r} for {task!r}"
                )
                words = said if around else f"another instruction: {said}"
                return self._add(name, words, 1.0)
        came = np.stack([each["context"] for each in stages])

        def distance(mistake):
            texts = []
            for window in self._windows:
                sent = mistake.apply(window)
                texts.append(encoders.text.prompt(sent.prompt, sent.template))
            try:
                rows = self._policy.assets.text_encoder.encode(texts, came.shape[1])[0]
            except (FileNotFoundError, ValueError):  # no weights here, or too many words
                return np.inf
            return float(np.abs(rows.astype(np.float32) - came).mean())

        self._best(name, [m for m in self._mistakes if m.concerns == "prompt"], distance)

    # ---- the search ----------------------------------------------------------------------------

    def _best(self, stage, mistakes, distance, unmistaken=None):
        """Adds the mistake that brings one nearest, if it brings one near; returns its share."""
        if unmistaken is None:
            unmistaken = distance(skew_mistakes.Mistake("", "", skew_mistakes.right))
        if not unmistaken:
            return 0.0
        best, share = None, 0.0
        for mistake in mistakes:
            explained = 1 - distance(mistake) / unmistaken
            if explained > share:
                best, share = mistake, explained
            if share > 0.9999:
                break
        if best is not None and share > _NEAR:
            self._add(stage, best.name, share)
        return share

    def _add(self, stage, name, explained):
        self.causes = [cause for cause in self.causes if cause.stage != stage]
        self.causes.append(Cause(stage, name, float(explained)))

    def _plan(self, sent):
        """f32 [N,T,A] of `Sent`s: by the deployed form, images of one size at a time."""
        planned = [None] * len(sent)
        key = lambda i: (sent[i].template, str([x.shape for x in sent[i].images.values()]))
        for (template, _), rows in itertools.groupby(sorted(range(len(sent)), key=key), key):
            rows = list(rows)
            images = {c: np.stack([sent[i].images[c] for i in rows]) for c in sent[0].images}
            state = np.stack([sent[i].state for i in rows])
            acting = self._with_template(template)
            made = acting.act(images, state, [sent[i].prompt for i in rows], rows=_MOST)
            for i, chunk in zip(rows, made):
                planned[i] = chunk
        return np.stack(planned)

    def _with_template(self, template):
        if template == self._policy.config.data.prompt_template:
            return self._deployed
        if template not in self._templates:
            self._templates[template] = self._deployed.with_prompt_template(template)
        return self._templates[template]


def of_guard(metadata, served, trained, moments, scale, limit):
    """Returns whether the guard explains the actions: training's, checked alike, are what came.

    Args:
      metadata: of the server. served: `Served`s. trained: `Trained`. moments: `Moment`s.
      scale: f32 [A], 1 over each dimension's range. limit: share of it that counts as equal.
    """
    close = lambda a, b: bool((np.abs(np.stack(a) - np.stack(b)) * scale).max() <= limit)
    if not any(each.guard for each in served) or not metadata.get("limits"):
        return False
    planned = [each.stages.get("planned") for each in served]
    if all(chunk is not None for chunk in planned):
        return close(planned, trained.physical)
    width, horizon = trained.physical.shape[-1], trained.physical.shape[-2]
    rows = {
        name: np.array([empty if x is None else x for x in metadata["limits"][name]], np.float32)
        for name, empty in (("low", -np.inf), ("high", np.inf), ("rate", np.inf))
    }
    guard = safety.Guard(safety.Limits(**rows, start=np.full(width, -1)), horizon)
    checked = [guard.check(p, m.state)[0] for p, m in zip(trained.physical, moments)]
    return close(checked, [each.actions for each in served])


def lines(wanted, got, what):
    """Returns in words how each number was multiplied or moved; "" where that explains nothing.

    Args:
      wanted, got: [N,D]. what: name of the numbers.
    """
    found = []
    for dim, (x, y) in enumerate(zip(wanted.T.astype(np.float64), got.T.astype(np.float64))):
        apart = np.abs(x - y).max()
        if apart <= _EXACT * np.abs(y).max() or np.ptp(x) < 1e-9:
            continue
        factor, offset = np.polyfit(x, y, 1)
        if np.abs(factor * x + offset - y).max() > (1 - _FOUND) * apart:
            return ""
        near = [w for f, w in skew_mistakes.UNITS.items() if abs(factor / f - 1) < 0.02]
        unit = f" (units: {near[0]})" if near and what == "state" else ""
        found.append(f"{what}[{dim}] is {factor:.4g} x {offset:+.4g}{unit}")
    return "; ".join(found)


def _order(sent, came):
    """In words, which dimensions of the state came in another place; "" where that is not it."""
    places = []
    for column in came.T:
        same = [i for i, x in enumerate(sent.T) if np.allclose(x, column, atol=1e-6, rtol=_EXACT)]
        if not same:
            return ""
        places.append(same[0])
    if sorted(places) != list(range(len(places))):
        return ""
    return f"order of the state: its places hold dimensions {places}"


def _small(images):
    """Pictures of 16 x 16 pixels."""
    small = lambda image: Image.fromarray(image).resize((16, 16), Image.Resampling.BOX)
    return {camera: np.asarray(small(image)) for camera, image in images.items()}


def _pixels(a, b):
    """Mean difference of pictures {camera: uint8 [h,w,3]}; 255 where the sizes differ."""
    return np.mean(
        [
            np.abs(a[c].astype(np.int16) - b[c]).mean() if a[c].shape == b[c].shape else 255.0
            for c in b
        ]
    )
