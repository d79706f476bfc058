"""In which order: KFP pipelines that chain the components, and their compiled packages."""
