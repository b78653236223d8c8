"""Detectors: one module per method, each with a `Config` and one function.

    detect(config, victim, view, key) -> Scores

says how suspicious each class of a model is and whether the model is judged to be backdoored. `view` contains clean
images and a callback, which receives recovered triggers. A detector that takes many times as long as the others sets
ON_REQUEST = True and runs only when it is named. `bdjax audit` combines the verdicts (:mod:`bdjax.pipelines.audit`).
"""
