"""Backdoors of models of images and captions: CLIP, its attacks, its defenses, and zero-shot evaluation.

Why this is a package of its own. The methods of :mod:`bdjax.attacks` and :mod:`bdjax.defenses` are about classifiers:
their task has integer labels, their loss is the cross-entropy of one image, and their models return logits. A dual
encoder is trained on pairs, its loss compares all pairs of a batch, and a class exists only as a set of captions. One
protocol for both would make every field optional. So pairs have

- types of their own (:mod:`bdjax.pair_types`): `DualEncoder`, `Pairs`, `PairTask` for an attacker, `PairView` for a
  defender, and the functions of a method;
- methods of their own, one file each, in `attacks/` and `defenses/`, listed by :mod:`bdjax.vision_language.methods`;
- directories of their own (:mod:`bdjax.vision_language.artifact`): a dual encoder with its tokenizer and trigger.

They share with the rest: the engine (devices, epochs, optimisers), the weight reader, the checkpoints, the registry's
rules (a method opens no file, prints nothing and chooses no devices; no method imports another), EWC, and PGD.

    pairs, tokenizer, prompts      what a dual encoder is trained on
    zero_shot                      accuracy and attack success rate by captions of the classes
    training, defending            the stages; `bdjax clip` is their command
"""
