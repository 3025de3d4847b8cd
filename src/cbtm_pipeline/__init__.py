"""Cluster-Branch-Train-Merge (Gururangan et al. 2023, arXiv 2303.14177) as a pipeline."""

from cbtm_pipeline.inference import register

__version__ = "0.3.0"

register.register()
