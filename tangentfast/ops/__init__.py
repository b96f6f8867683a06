"""The numerical ops: one folder each, with a plain-torch reference and the kernels that match it.

Ops take tensors and numbers only; they know nothing of models, names or duals. `backend` decides
which implementation runs.
"""
