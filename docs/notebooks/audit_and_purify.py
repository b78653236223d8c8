# %% [markdown]
# # A PyTorch file, audited and purified
#
# The suspicious file here is a victim of our own, exported with PyTorch's names and layout. Reading it back runs
# nothing that is in it.

# %%
from pathlib import Path

import numpy as np

import bdjax
from bdjax import interop

victim = bdjax.train("badnets", dataset="digits", model="mnist_cnn", fit={"epochs": 15})
interop.export_model(victim.directory, "torch", Path("net.pth"))

# %% [markdown]
# The clean images are a file with uint8 arrays.

# %%
data = bdjax.load_dataset("digits")
np.savez(
    "clean.npz",
    x_train=data.x_train,
    y_train=data.y_train,
    x_test=data.x_test,
    y_test=data.y_test,
    classes=np.array(data.classes),
)
suspect = bdjax.load_model("net.pth", model="mnist_cnn")
accuracy = (suspect.predict(data.x_test) == data.y_test).mean()
print(f"accuracy {accuracy:.3f} (n = {len(data.y_test)})")

# %%
result = bdjax.purify(
    "net.pth", "cleaned", model="mnist_cnn", clean_data="npz:clean.npz", defense="targeted_unlearning",
    detectors=("additive", "universal"),
)  # fmt: skip
print(result)

# %%
assert result.weights.exists() and result.report.exists()
