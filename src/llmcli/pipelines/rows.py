"""Token ids, from a list for each row to a padded batch."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


class RowPipeline:
    """What our pipelines have in common: they read text alone, and place their tensors themselves."""

    spare: str | None = None
    _load_tokenizer = True
    _load_feature_extractor = False
    _load_image_processor = False
    _load_processor = False

    def _ensure_tensor_on_device(self, inputs: Any, device: Any) -> Any:
        return inputs  # transformers would look for tensors in every list, of which there is one for each field


def row(ids: Sequence[int]) -> "array[int]":
    """What `preprocess` gives for each token of one row. A tensor would cost more than all else that is done for a
    record, and a list takes five times the memory."""
    return array("q", ids)


def listed(inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What `preprocess` gave, a list for each field: of one row, as a pipeline runs it alone, or of a batch."""
    is_batch = isinstance(inputs["input_ids"], list)
    return {name: value if is_batch else [value] for name, value in inputs.items()}


def padded(rows: Sequence[Any], pad: int, device: Any, *, left: bool = False) -> tuple[Any, Any]:
    """input_ids and attention_mask, int64 (B, P), of B rows of at most P tokens."""
    length = max(map(len, rows))
    ids, mask = np.full((len(rows), length), pad, np.int64), np.zeros((len(rows), length), np.int64)
    for i, each in enumerate(rows):
        own = slice(length - len(each), None) if left else slice(len(each))
        ids[i, own] = each
        mask[i, own] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
