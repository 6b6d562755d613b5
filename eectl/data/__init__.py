"""Data: named data sets, image folders and text files, their splits, batches in a reproducible order, and batched augmentation.

torch is imported here; torchvision, scikit-learn, PIL, transformers and datasets only where something needs them.
"""

from eectl.data.augment import Augmenter, join_draws
from eectl.data.batches import eval_batches, eval_order, num_batches, train_batches
from eectl.data.carving import place_of
from eectl.data.load import data_info, load_data, outline
from eectl.data.sources import DATASETS
from eectl.data.splits import Batch, DataInfo, Dataset, Split, class_counts, note_on_classes

__all__ = [
    "DATASETS",
    "Augmenter",
    "Batch",
    "DataInfo",
    "Dataset",
    "Split",
    "class_counts",
    "data_info",
    "eval_batches",
    "eval_order",
    "join_draws",
    "load_data",
    "note_on_classes",
    "num_batches",
    "outline",
    "place_of",
    "train_batches",
]
