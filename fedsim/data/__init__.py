"""Data: labelled images in [0, 1], who holds which, and which batch a client uses in a round.

Importing this needs torch and numpy only; what decodes, downloads or partitions is imported when it is used.
"""

from fedsim.data.batches import batch_of, batches_of
from fedsim.data.images import Dataset, Images
from fedsim.data.partition import IID, ByClass, Dirichlet, Partition, SizeSkewed
from fedsim.data.sources import NAMES, DataNotFound, check, load

__all__ = [
    "IID",
    "NAMES",
    "ByClass",
    "DataNotFound",
    "Dataset",
    "Dirichlet",
    "Images",
    "Partition",
    "SizeSkewed",
    "batch_of",
    "batches_of",
    "check",
    "load",
]
