"""Tandem's Kubernetes operator: fleets, their pools of expert-parallel groups, and the groups' pods."""
