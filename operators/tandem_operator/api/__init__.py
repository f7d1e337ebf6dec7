"""The resources of tandem.dev/v1alpha1 as pydantic classes: CRDs and the chart's values schema come from these."""

GROUP = "tandem.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
