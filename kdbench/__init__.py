"""kdbench: knowledge distillation methods trained under one loop and compared in one table."""

__version__ = "0.1.0"
