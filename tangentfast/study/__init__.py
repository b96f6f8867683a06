"""The task-arithmetic experiments: where their weights and images come from, and how they run.

Needs the extra `demo` (timm, onnx, scikit-learn, matplotlib, pillow, rich); the library does not.
"""
