"""What a fresh cluster needs before the first run: buckets, registered pipelines, MLflow's models, roles and webhook.

Runs after every install and upgrade. Each part looks first and changes only what differs, so it may be repeated, and a
part that fails does not keep the others from being tried.
"""
