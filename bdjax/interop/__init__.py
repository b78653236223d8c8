"""Exchange of models with PyTorch: weight files read and written without PyTorch, matched by name and shape.

`import_model` converts a weight file to a model directory, `export_model` a model directory to a weight file. An
imported model is exported with the same names, order, types and bits: what the variables do not hold (the counters of
batch normalisation, the lower half of double precision) is stored beside them in original.npz.
"""

from bdjax.interop._exporting import FORMATS, export_model, model_of
from bdjax.interop._importing import import_model, option_to_json

__all__ = ["FORMATS", "export_model", "import_model", "model_of", "option_to_json"]
