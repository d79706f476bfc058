"""MLflow: runs, lineage and candidate versions."""
