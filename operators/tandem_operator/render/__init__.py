"""Children as pure functions of their parents: specs in, Kubernetes objects out."""
