"""Merge and gram: weighted sums and inner products of many tensors in one pass over memory."""

from tangentfast.ops.merge.op import gram, merge_

__all__ = ["gram", "merge_"]
