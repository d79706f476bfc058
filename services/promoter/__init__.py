"""The promoter: looks at the registry every few minutes and moves candidates that pass to production.

MLflow's webhooks are lost on a restart and after three tries (platform.md 4.2), so they only wake it early.
"""
