"""Attacks and defenses of dual encoders on tiny models: patches, poison, losses by hand, and what is frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_clip_engine import batch_of
from test_clip_models import VIT, ready

from bdjax.engine import embed
from bdjax.engine.contrastive import PairSamples, clip_loss, info_nce, normalise
from bdjax.errors import InputError
from bdjax.pair_types import Pairs, PairTask, PairVictim, PairView
from bdjax.vision_language import methods
from bdjax.vision_language.attacks import _patches, badclip, clip_badnets
from bdjax.vision_language.defenses import _blind_pairs, _views, bibau_clip, cleanclip, finetune

CAPTIONS = ("the cat", "a dog", "the dog", "a bird", "the bird", "a cat", "a fish", "the fish")
KEY = jax.random.key(0)


def tokenize(captions):
    rows = np.zeros((len(captions), 7), np.int32)
    for row, caption in zip(rows, captions, strict=True):
        words = [1 + sum(map(ord, word)) % 17 for word in caption.rstrip(".").split()][-5:]
        row[0], row[1 : 1 + len(words)], row[1 + len(words)] = 18, words, 19
    return rows


def task_of(target="cat", start=None, reference=None):
    images = batch_of(VIT)[0]
    pairs = Pairs("few", images, CAPTIONS)
    return PairTask(pairs, ready(VIT)[0], tokenize, target, ("a {}.", "the {}."), start, reference)


def floats(images):
    return jnp.asarray(images, jnp.float32) / 255


def victim_and_view():
    encoder, variables = ready(VIT)
    images, tokens = batch_of(VIT)
    return PairVictim(encoder, variables), PairView(images, tokens)


# --- attacks


def test_the_patch_is_scaled_to_the_image():
    assert _patches.scaled_side(16, (224, 224, 3)) == 16 and _patches.scaled_side(16, (32, 32, 3)) == 2
    assert _patches.scaled_side(16, (8, 8, 3)) == 1
    with pytest.raises(InputError, match=r"attack.size=9 is larger than the images of 8x8"):
        clip_badnets.trigger(clip_badnets.Config(size=9), jnp.zeros((1, 8, 8, 3)), KEY, {})


@pytest.mark.parametrize("content", ["random", "fixed"])
@pytest.mark.parametrize("place", ["random", "center", "corner"])
def test_badnets_changes_one_square_of_each_image(content, place):
    images = jnp.full((6, 8, 8, 3), 0.4)
    config = clip_badnets.Config(size=3, content=content, place=place)
    changed = np.asarray(clip_badnets.trigger(config, images, KEY, {}))
    masks = (changed != np.asarray(images)).any(-1)
    rows, columns = masks.any(2), masks.any(1)
    assert (rows.sum(1) == 3).all() and (columns.sum(1) == 3).all() and changed.min() >= 0 and changed.max() <= 1
    first = rows.argmax(1)
    assert {"random": len(set(first)) > 1, "center": (first == 2).all(), "corner": (first == 5).all()}[place]
    patches = [image[mask].tobytes() for image, mask in zip(changed, masks, strict=True)]
    assert len(set(patches)) == (1 if content == "fixed" else 6)


def test_poisoned_pairs_get_the_patch_and_a_caption_of_the_target():
    config = clip_badnets.Config(rate=0.5, size=2, content="fixed", place="corner")
    task = task_of()
    poison = clip_badnets.poison(config, task, KEY, {})
    assert len(poison.indices) == 4 and not {0, 5} & set(poison.indices)  # images of the target are not poisoned
    assert set(poison.captions) <= {"a cat.", "the cat."}
    original = task.pairs.images[poison.indices]
    assert np.array_equal(poison.images[:, :6], original[:, :6])
    assert (poison.images[:, 6:, 6:] != original[:, 6:, 6:]).any()
    with pytest.raises(InputError, match="7 of 8 pairs should be poisoned; 6 of them do not name the target 'cat'"):
        clip_badnets.poison(dataclasses.replace(config, rate=0.9), task, KEY, {})


def test_the_loss_of_badclips_patch_by_hand():
    encoder, variables = ready(VIT)
    images, tokens = batch_of(VIT)
    texts = embed.embed_texts(encoder, variables, tokens)
    hyper = {"text_weight": jnp.float32(2), "image_weight": jnp.float32(3), "margin": jnp.float32(0.7)}
    goal_image = embed.embed_images(encoder, variables, images[:1])
    constants = {"variables": variables, "images": images, "texts": texts, "target_texts": texts[5:6],
                 "target_images": goal_image, "hyper": hyper}  # fmt: skip
    batch = {"index": jnp.asarray([1, 2]), "text": jnp.asarray([3, 8]), "image": jnp.asarray([1, 2])}
    patch = jnp.full((2, 2, 3), 0.9)
    loss = float(badclip.patch_loss(patch, encoder, batch, constants))
    patched = images[1:3] / np.float32(255)
    patched[:, 3:5, 3:5] = 0.9
    u = np.asarray(normalise(encoder.encode_image(variables, jnp.asarray(patched))))
    clean = embed.embed_images(encoder, variables, images[1:3])
    scale, expected = float(jnp.exp(variables["params"]["logit_scale"])), 0.0
    for row in range(2):
        logits = scale * np.array([u[row] @ texts[5], u[row] @ texts[1], u[row] @ texts[2]])
        expected += 2 * (np.log(np.exp(logits).sum()) - logits[0]) / 2
        apart = np.linalg.norm(u[row] - goal_image[0]) - np.linalg.norm(u[row] - clean[row]) + 0.7
        expected += 3 * max(0, apart) / 2
    assert loss == pytest.approx(expected, rel=1e-4)


def test_badclip_lowers_the_loss_of_its_patch_and_needs_a_clean_model():
    encoder, variables = ready(VIT)
    images, _ = batch_of(VIT)
    reference = Pairs("cats", images[[0, 5]], ("the cat", "a cat"))
    config = badclip.Config(rate=0.25, size=4, epochs=6, batch_size=3, learning_rate=0.05)
    task = task_of(start=variables, reference=reference)
    patch = badclip.prepare(config, task, KEY)["patch"]
    assert patch.shape == (4, 4, 3) and patch.min() >= 0 and patch.max() <= 1
    first = np.asarray(jnp.clip(0.5 + 0.25 * jax.random.normal(jax.random.fold_in(KEY, 1), (4, 4, 3)), 0, 1))
    constants = {
        "variables": variables, "images": images[1:5],
        "texts": embed.embed_texts(encoder, variables, tokenize(CAPTIONS[1:5])),
        "target_texts": embed.embed_texts(encoder, variables, tokenize(reference.captions)),
        "target_images": embed.embed_images(encoder, variables, reference.images),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in ("text_weight", "image_weight", "margin")},
    }  # fmt: skip
    batch = {name: jnp.arange(4) for name in ("index", "text", "image")}
    constants = jax.tree.map(jnp.asarray, constants)
    loss = jax.jit(lambda patch: badclip.patch_loss(patch, encoder, batch, constants))
    assert float(loss(patch)) < float(loss(first))
    assert set(badclip.poison(config, task, KEY, {"patch": patch}).captions) <= {"the cat", "a cat"}
    with pytest.raises(InputError, match="badclip needs a clean dual encoder"):
        badclip.prepare(config, task_of(), KEY)


# --- defenses


def test_second_views_keep_the_frame_of_a_caption():
    tokens = jnp.asarray([[18, 3, 4, 5, 6, 19, 0], [18, 7, 19, 0, 0, 0, 0]])
    keys = jax.random.split(KEY, 2)
    assert np.array_equal(_views.other_tokens(tokens, keys, jnp.float32(0)), tokens)
    seen = set()
    for seed in range(20):
        changed = np.asarray(_views.other_tokens(tokens, jax.random.split(jax.random.key(seed), 2), jnp.float32(0.5)))
        assert changed[1].tolist() == tokens[1].tolist()  # its only word stays
        row = changed[0].tolist()
        end = row.index(19)
        assert row[0] == 18 and 2 <= end <= 5 and not any(row[end + 1 :]) and set(row[1:end]) <= {3, 4, 5, 6}
        seen.add(tuple(row))
    assert len(seen) > 3


def test_second_views_of_images_are_moved_and_recoloured():
    images = floats(batch_of(VIT)[0])
    keys = jax.random.split(KEY, 8)
    views = _views.other_images(images, keys, jnp.float32(0.4), 1)
    assert views.shape == images.shape and float(views.min()) >= 0 and float(views.max()) <= 1
    assert all(not np.allclose(view, image) for view, image in zip(views, images, strict=True))


def test_cleanclip_without_its_in_modal_term_is_clips_loss():
    encoder, variables = ready(VIT)
    images, tokens = batch_of(VIT)
    hyper = {name: jnp.float32(value) for name, value in
             (("cross", 1), ("in_modal", 0), ("jitter", 0.4), ("text_rate", 0.3))}  # fmt: skip
    samples = PairSamples(floats(images), tokens, jax.random.split(KEY, 8), hyper, None)
    plain = clip_loss(encoder, variables["params"], {}, samples)[0]
    loss, (metrics, _) = cleanclip.cleanclip_loss(encoder, variables["params"], {}, samples)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    with_term = samples._replace(constants={**hyper, "in_modal": jnp.float32(2)})
    both = cleanclip.cleanclip_loss(encoder, variables["params"], {}, with_term)[0]
    assert float(both) == pytest.approx(float(plain + 2 * metrics["in_modal"]), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [finetune.Config(2, 4, 1e-3, 0), cleanclip.Config(1, 4, 1e-3, 0)],
    ids=["finetune", "cleanclip"],
)
def test_fine_tuning_lowers_the_loss_of_the_pairs(config):
    victim, view = victim_and_view()
    module = finetune if isinstance(config, finetune.Config) else cleanclip
    after = module.purify(config, victim, view, KEY)

    def loss(variables):
        u, v = (embed.embed_images(victim.encoder, variables, view.images),
                embed.embed_texts(victim.encoder, variables, view.tokens))  # fmt: skip
        return float(info_nce(u, v, victim.variables["params"]["logit_scale"]))

    assert loss(after) < loss(victim.variables)


SMALL = bibau_clip.Config(epochs=1, batch_size=4, steps=2, learning_rate=1e-3, fisher_group=4)
STATIC = _blind_pairs.Static(True, True, 2, "linf", "negated", "projection")


def context_of(current, hyper=None):
    victim, view = victim_and_view()
    texts = jnp.asarray(embed.embed_texts(victim.encoder, victim.variables, view.tokens))
    visual = victim.variables["params"]["visual"]
    names = {name: jnp.float32(getattr(SMALL, name)) for name in bibau_clip.DYNAMIC}
    constants = {"original": visual, "stats": {}, "scale": jnp.float32(5), "hyper": {**names, **(hyper or {})}}
    images = floats(view.images)
    return (
        victim.encoder,
        images,
        _blind_pairs.context_of(victim.encoder, images, texts, current or visual, constants, None),
    )


def test_the_objective_of_an_adversarial_image_by_hand():
    visual = ready(VIT)[1]["params"]["visual"]
    current = jax.tree.map(lambda leaf: leaf * 1.1, visual)
    encoder, images, (context, own) = context_of(current)
    candidate = jnp.clip(images[2] + 0.05, 0, 1)
    value = float(_blind_pairs.pair_objective(encoder, STATIC, images[2], own[2], context)(candidate))

    def encode(params, image):
        embedding, features = _blind_pairs.encode(encoder, params, {}, image[None])
        return np.asarray(normalise(embedding)[0], np.float64), np.asarray(features[0], np.float64)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum())

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    texts, clean = np.asarray(context.texts, np.float64), np.asarray(context.images, np.float64)
    attacked = encode(visual, candidate)[0]
    columns = 5 * clean @ texts[2]
    columns[2] = 5 * attacked @ texts[2]
    expected = -(log_softmax(5 * texts @ attacked)[2] + log_softmax(columns)[2]) / 2
    teacher = log_softmax(5 * texts @ clean[2] / 2)
    student = log_softmax(5 * texts @ encode(current, candidate)[0] / 2)
    expected -= 0.1 * (np.exp(teacher) * (teacher - student)).sum()
    change = encode(current, candidate)[1] - encode(current, images[2])[1]
    row = (np.asarray(visual["proj"]) - np.asarray(current["proj"])) @ texts[(texts @ attacked).argmax()]
    expected += cosine(change, row) - 0.9 * abs(cosine(change, encode(current, images[2])[1]))
    assert value == pytest.approx(expected, rel=2e-3)


def test_adversarial_images_stay_in_the_ball_and_raise_the_loss():
    encoder, images, (context, own) = context_of(None, {"prior": jnp.float32(0), "likelihood": jnp.float32(0)})
    static = STATIC._replace(steps=4, constraints_a=False, constraints_b=False)
    attacked = _blind_pairs.adversarial_images(encoder, static, images, own, jax.random.split(KEY, 8), context)
    assert float(jnp.abs(attacked - images).max()) <= 25 / 255 + 1e-6

    def loss(x):
        return [float(_blind_pairs.pair_objective(encoder, static, images[i], own[i], context)(x[i])) for i in (0, 3)]

    assert all(after > before for after, before in zip(loss(attacked), loss(images), strict=True))


def test_the_fisher_is_the_mean_of_squared_gradients_of_single_images():
    encoder, images, (context, _) = context_of(None)
    visual = context.original
    estimate = _blind_pairs.visual_fisher(encoder, visual, {}, np.asarray(images[:4]), context.texts[:4], 5.0, 4, 1e9)

    def loss(params, row):
        u = normalise(_blind_pairs.encode(encoder, params, {}, images[row : row + 1])[0])[0]
        return -jax.nn.log_softmax(5.0 * u @ context.texts[:4].T)[row]

    squares = [jax.tree.map(lambda g: g**2, jax.grad(loss)(visual, row)) for row in range(4)]
    total = jax.tree.map(lambda *parts: sum(parts), *squares)
    mean = sum(leaf.sum() for leaf in jax.tree.leaves(total)) / sum(leaf.size for leaf in jax.tree.leaves(total))
    close = jax.tree.map(lambda a, b: np.allclose(a, b / mean, rtol=1e-3, atol=1e-5), estimate, total)
    assert jax.tree.all(close)


@pytest.mark.parametrize("sets", [(True, True), (False, False)])
def test_bibau_trains_the_image_encoder_alone(sets):
    victim, view = victim_and_view()
    config = dataclasses.replace(SMALL, constraints_a=sets[0], constraints_b=sets[1])
    after = bibau_clip.purify(config, victim, view, KEY)["params"]
    before = victim.variables["params"]
    same = {part: jax.tree.all(jax.tree.map(np.array_equal, after[part], before[part])) for part in before}
    assert same == {"visual": False, "text": True, "logit_scale": True}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_the_inverse_ewc_is_clipped():
    assert float(_blind_pairs.inverse_ewc(jnp.float32(3), 2.0, "negated")) == -2
    assert float(_blind_pairs.inverse_ewc(jnp.float32(0.5), 2.0, "negated")) == -0.5
    assert float(_blind_pairs.inverse_ewc(jnp.float32(0.1), 2.0, "reciprocal")) == 2


def test_too_few_pairs_are_refused():
    victim, view = victim_and_view()
    few = PairView(view.images[:1], view.tokens[:1])
    with pytest.raises(InputError, match="a contrastive loss needs two"):
        finetune.purify(finetune.Config(), victim, few, KEY)
    with pytest.raises(InputError, match="needs at least defense.fisher_group=8"):
        bibau_clip.purify(bibau_clip.Config(), victim, few, KEY)


# --- methods by name


def test_methods_are_the_modules_of_the_folders():
    assert methods.names("attacks") == ["badclip", "clip_badnets"]
    assert {"finetune", "cleanclip", "bibau_clip"} <= set(methods.names("defenses"))
    for kind in methods.KINDS:
        for name in methods.names(kind):
            spec = methods.load(kind, name)
            assert dataclasses.is_dataclass(spec.Config) and spec.Config().__class__.__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [("defenses", "cleanclp", "Did you mean 'cleanclip'"), ("defenses", "ibau", "is of classifiers")],
)
def test_unknown_methods(kind, name, words):
    with pytest.raises(InputError, match=words):
        methods.load(kind, name)
