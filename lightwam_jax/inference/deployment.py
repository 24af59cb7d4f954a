"""Which deployed form a model has."""

from lightwam_jax.inference import deploy, deploy_flow, deploy_joint


def form(config):
    """Returns the module with `deployed`, `keys_values` and `act` of a `ModelConfig`."""
    if config.imagines:
        return deploy_joint
    return deploy_flow if config.generates else deploy
