"""Measurements that ``run.py bench`` makes, one module a kind; contenders are interleaved in one run."""
