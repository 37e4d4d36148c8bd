"""Data: labelled images in [0, 1] or masked sentences, who holds which, and which batch a client uses in a round.

Importing this needs torch and numpy only; what decodes, downloads or partitions is imported when it is used.
"""

from fedsim.data.batches import batch_of, batches_of
from fedsim.data.images import Dataset, Images
from fedsim.data.partition import IID, ByClass, Dirichlet, Partition, SizeSkewed
from fedsim.data.sources import NAMES, DataNotFound, check, image_shape, load
from fedsim.data.text import Corpus, Sentences, Vocabulary

__all__ = [
    "IID",
    "NAMES",
    "ByClass",
    "Corpus",
    "DataNotFound",
    "Dataset",
    "Dirichlet",
    "Images",
    "Partition",
    "Sentences",
    "SizeSkewed",
    "Vocabulary",
    "batch_of",
    "batches_of",
    "check",
    "image_shape",
    "load",
]
