"""Training on a cluster: one stage as a TrainJob of Kubeflow Trainer v2 (spec: platform.md 2).

`launch` is what the training step calls. It builds the TrainJob (`spec`), checks it against the API's schema
(`schema`), creates or adopts it and waits for its end (`wait`), reading the log of the first node for progress (`log`).
What came out is read from the object store, never from a log.
"""
