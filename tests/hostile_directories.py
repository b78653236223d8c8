"""Model directories, results and data that nobody should trust: every field of every record with values that hurt."""

import hashlib
import json

from bdjax.pipelines.artifact import experiment_of
from bdjax.pipelines.training import training_record, trigger_previews

EVIL = "evil.py"
"""A file of code beside the directory; it leaves a mark when it is run (`code`)."""
WRONG = {
    "nothing": None, "a truth": True, "a number": 7, "a negative number": -1, "a fraction": 0.5,
    "a huge number": 10**400,
    "no number": float("nan"), "infinity": float("inf"), "a text": "x", "an empty text": "", "a list": [], "fields": {},
    "a list of lists": [[[]]], "fields of fields": {"": {"": None}}, "a path that climbs": "../../../etc/passwd",
    "controls": "\x1b[2J\x1b]0;x\x07\u202e\u2066\x85\nbdjax: all is well", "half a pair": "\ud800",
}  # fmt: skip


def code(folder):
    """Write the file of code; returns (its path, the mark that it leaves)."""
    mark = folder / "ran"
    (folder / EVIL).write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom bdjax.attacks.badnets import *\nfrom bdjax.models.cnn import *\n"
        "from bdjax.datasets.digits import *\ndef purify(*a): pass\ndef solve(matvec, b): return b\n"
    )
    return folder / EVIL, mark


def places(value, path=()):
    """The path of every field and element of a record (of a long list the first), inner ones, too."""
    found = [path] if path else []
    if isinstance(value, dict):
        for name, held in value.items():
            found += places(held, (*path, name))
    elif isinstance(value, list):
        for place, held in enumerate(value[:1]):
            found += places(held, (*path, place))
    return found


def changed(value, path, new):
    """A copy of a record with `new` at `path`."""
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(value[path[0]], path[1:], new)
    return copied


def without(value, path):
    """A copy of a record without the field at `path`."""
    copied = dict(value) if isinstance(value, dict) else list(value)
    if len(path) > 1:
        copied[path[0]] = without(value[path[0]], path[1:])
    else:
        del copied[path[0]]
    return copied


def seal(manifest):
    """The text of a manifest with a right seal, as anybody can write it."""
    text = json.dumps({**manifest, "seal": "0" * 64}, indent=1, sort_keys=True)
    return text.replace('"seal": "' + "0" * 64, '"seal": "' + hashlib.sha256(text.encode()).hexdigest())


def rewrite(directory, manifest):
    """Put a changed manifest in its place, sealed."""
    (directory / "manifest.json").write_text(seal(manifest))


def relist(directory):
    """Write down the hashes of what lies in the directory now, as its author would."""
    manifest = json.loads((directory / "manifest.json").read_text())
    files = {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }
    rewrite(directory, {**manifest, "files": files})


def manifests(data, spec):
    """What the manifests of every kind hold before they are written: {kind: fields}."""
    from bdjax.config import Experiment, SplitConfig, config_of, to_json

    def method(kind, name):
        return {"name": name, "config": to_json(config_of(kind, name)()), "seed": 0}

    experiment = Experiment("badnets", None, spec, "cnn", 0, config_of("attacks", "badnets")(target=1, size=2))
    victim = {
        "kind": "victim", "hash": "0" * 64, **json.loads(json.dumps(training_record(experiment, data))),
        "poison": {"n": 3, "copies": 1, "sha256": "0" * 64}, "seconds": {"attack": 1.0, "compile": 1.0},
        "curve": [{"step": 1, "train_loss": 1.0}], "env": {"device": "cpu", "jax": "0"},
    }  # fmt: skip
    purified = {**victim, "kind": "purified", "victim_hash": "0" * 64, "defense": method("defenses", "ibau")}
    source = {
        "file": "weights.pt", "sha256": "0" * 64, "format": "torch", "names": "bdjax", "key": "", "prefix": "",
        "tensors": [["Conv_0.weight", "float32", [16, 1, 3, 3]]], "kept": [], "skipped": {"epoch": "builtins.set"},
        "ignored": ["mask"], "normalised": ["mean", "std"], "classes": "class_to_idx", "accuracy": 0.5,
        "unnamed": "'names': 2 names for 3 outputs",
    }  # fmt: skip
    given = {"mean": [0.5], "std": [0.25], "channels": "rgb", "layout": "chw", "resize": 0}
    return {
        "victim": victim,
        "purified": {**purified, "split": to_json(SplitConfig(size=20))},
        "reactivated": {**victim, "kind": "reactivated", "reactivation": method("attacks", "retuning")},
        "imported": {
            **victim, "kind": "imported", "attack": None, "dataset": None, "fit": None, "poison": None, "width": None,
            "input": given, "source": source, "variant": {}, "assumed": {}, "tried": [{"options": {}, "acc": 0.5}],
            "note": "",
        },
    }  # fmt: skip


def make(folder, spec):
    """Model directories of every kind, of untrained models for the data set `spec`: {kind: directory}."""
    import jax
    import numpy as np

    from bdjax import datasets, interop, models
    from bdjax.io import checkpoint

    data = datasets.load(spec)
    found = manifests(data, spec)
    model = models.create("cnn", data.shape, len(data.classes))
    variables = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    trigger = trigger_previews(experiment_of(found["victim"], None, None, None, None), data, {})
    for kind in ("victim", "purified", "reactivated"):
        checkpoint.write_model(folder / kind, found[kind], variables, {"trigger": trigger})
    interop.export_model(folder / "victim", "safetensors", folder / "weights.safetensors")
    given = models.Input((0.5,), (0.25,))
    weights, size = folder / "weights.safetensors", data.shape[:2]
    interop.import_model(weights, folder / "imported", model="cnn", size=size, input=given, env={})
    return {kind: folder / kind for kind in found}
