"""Tasks and their data: a model and fixed tokens in, measurements with standard errors out.

Imports torch, but neither transformers nor datasets.
"""

from autocompress.evaluate import tasks as _tasks  # registers the tasks
from autocompress.evaluate.corpus import Corpus
from autocompress.evaluate.curvature_loss import TaskLoss, curvature_batches
from autocompress.evaluate.data import CORPORA, load_corpus
from autocompress.evaluate.detection import detect_task
from autocompress.evaluate.forward_plan import ForwardPlan, plan_forward, with_noise
from autocompress.evaluate.splits import Example, Split, Splits, count_tokens, make_splits
from autocompress.evaluate.task import TASKS, CorpusKind, Reference, Scores, Task, join

__all__ = [
    "CORPORA",
    "TASKS",
    "Corpus",
    "CorpusKind",
    "Example",
    "ForwardPlan",
    "Reference",
    "Scores",
    "Split",
    "Splits",
    "Task",
    "TaskLoss",
    "count_tokens",
    "curvature_batches",
    "detect_task",
    "join",
    "load_corpus",
    "make_splits",
    "plan_forward",
    "with_noise",
]

del _tasks
