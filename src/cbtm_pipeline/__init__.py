"""Cluster-Branch-Train-Merge (Gururangan et al. 2023, arXiv 2303.14177) as a pipeline."""

__version__ = "0.3.0"
