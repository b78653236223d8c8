"""What the tests of the attacks that train nothing share: tasks of random images, and what an attack makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import perceptron, untrained_task

from bdjax import attacks, registry

KEY = jax.random.key(7)


def config_of(name, **fields):
    return registry.load_module("attacks", name).Config(**fields)


def task_of(shape=(32, 32, 3), count=40, classes=4, file=None):
    """Random images, `count` of them, labels 0, 1, 2, 3, 0 ...; every file that is read is the array `file`."""
    images = np.random.default_rng(3).integers(0, 256, (count, *shape)).astype(np.uint8)
    labels = np.arange(count, dtype=np.int32) % classes
    return untrained_task(images, labels, perceptron(shape, classes), file)


def planted(name, task, **fields):
    return attacks.plant(name, config_of(name, **fields), task, KEY).poison


def stamped(name, images, task=None, training=False, **fields):
    """Float images with the trigger of test time (or of training) on them."""
    config, images = config_of(name, **fields), np.asarray(images, np.float32)
    module = registry.load_module("attacks", name)
    arrays = {}
    if hasattr(module, "prepare"):
        arrays = module.prepare(config, task or task_of(images.shape[1:]), KEY)
    return np.asarray(attacks.trigger_of(name, config, arrays, training)(jnp.asarray(images), KEY)), arrays


def grey(value, shape=(32, 32, 3), count=1):
    return np.full((count, *shape), value, np.float32)
