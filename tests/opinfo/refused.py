"""What is not computed: operations that tangentfast refuses, and those that torch itself cannot."""

from __future__ import annotations
