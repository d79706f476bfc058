"""KFP pipelines: in which order the components run."""
