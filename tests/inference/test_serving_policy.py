"""A real policy behind the server: the same actions to the bit, and nothing compiles afterwards."""

import numpy as np
import pytest

from lightwam_jax.inference import contexts as contexts_lib
from tests.inference.test_policy import make_config, make_policy, observe
from tests.served import serving


@pytest.fixture(scope="module")
def policy():
    return make_policy(make_config())


def ask(running, socket, observation, row=0):
    images, state, prompts = observation
    request = {
        "images": {camera: image[row] for camera, image in images.items()},
        "state": state[row],
        "prompt": prompts[row],
    }
    return running.ask(socket, request)


def test_served_exactly_the_policys_actions_and_no_compilation_after_ready(policy):
    deployed = policy.deployed()
    with serving(deployed, exact=True, max_batch=2) as running, running.connect() as socket:
        before = deployed.traces
        for seed in range(3):
            seen = observe(1, seed)
            reply = ask(running, socket, seen)
            np.testing.assert_array_equal(reply["actions"], deployed.act(*seen, rows=2)[0])
        assert running.metadata["state_dim"] == 5 and running.metadata["new_prompts"] == "encode"
        images, state, _ = observe(1, 5)
        large = {camera: image.repeat(2, 1).repeat(2, 2) for camera, image in images.items()}
        reply = ask(running, socket, (large, state, ["a new instruction"]))
        want = deployed.act(large, state, ["a new instruction"], rows=2)[0]
        np.testing.assert_array_equal(reply["actions"], want)
        assert deployed.traces == before
        text = running.get("/metrics")[1]
        assert 'compilations_total{what="action"} 0' in text
        assert 'compilations_total{what="image_size"} 1' in text


def test_forced_rows(policy):
    observation = observe(1)
    alone = policy.act(*observation)
    np.testing.assert_allclose(policy.act(*observation, rows=2), alone, atol=1e-4)
    two = observe(2)
    same = {camera: image[:1] for camera, image in two[0].items()}, two[1][:1], two[2][:1]
    np.testing.assert_array_equal(policy.act(*same, rows=2)[0], policy.act(*two)[0])
    for rows in (3, 1):
        with pytest.raises(ValueError, match=f"rows={rows} for 2"):
            policy.act(*two, rows=rows)


def test_known_prompts_and_new_ones(policy):
    assert policy.known_prompts == ()  # its encoder has no cache
    assert not policy.known_prompt("wave twice")
    policy.add_prompt("wave twice")
    assert policy.known_prompt("wave twice")


def test_encoded_instructions_are_bounded_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(contexts_lib, "KEPT_TEXTS", 3)
    encoded = []

    def encode(texts):
        encoded.extend(texts)
        rows = np.zeros((len(texts), 2, 3), np.float32)
        return rows, np.ones((len(texts), 2), bool)

    axes = {"text": 0, "mask": 0}
    made = contexts_lib.Contexts(encode, lambda text, mask: {"text": text, "mask": mask}, axes)
    made.add(["a", "b", "c"])
    made(["a"], 1)  # used: "b" is the oldest now
    made.add(["d"])
    assert "a" in made and "b" not in made and encoded == ["a", "b", "c", "d"]
    made(["b"], 1)
    assert encoded == ["a", "b", "c", "d", "b"] and "c" not in made
    made(["a", "b", "c", "d"], 4)  # more than are kept still make a batch
    assert len(made._texts) == 3
