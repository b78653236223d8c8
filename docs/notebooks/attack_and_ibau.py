# %% [markdown]
# # Plant a backdoor and remove it
#
# A white square makes a classifier of handwritten digits predict class 8. I-BAU removes this backdoor with clean images
# only: it knows neither the square nor the class.

# %%
import bdjax

victim = bdjax.train("badnets", dataset="digits", fit={"epochs": 15})
before = bdjax.evaluate(victim)
print(f"clean accuracy {before['acc']:.3f} (n = {before['n_test']}), ASR {before['asr']:.3f} (n = {before['n_asr']})")

# %% [markdown]
# The victim is a model like any other: calling it on images gives logits.

# %%
data = bdjax.load_dataset("digits")
predicted = victim.predict(data.x_test[:8])
print("labels   ", data.y_test[:8].tolist())
print("predicted", predicted.tolist())

# %% [markdown]
# The defense gets half of the test images, and is measured on the other half.

# %%
cleaned = bdjax.defend(victim, "ibau")
print(cleaned)
cleaned

# %%
assert cleaned.before["asr"] > 0.9 and cleaned.after["asr"] < 0.1
