"""One thread for each process: the tests' models are too small for more, and the tests run side by
side (`make test`), each worker on a core of its own.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, by the tests' own processes too

import torch

torch.set_num_threads(1)
