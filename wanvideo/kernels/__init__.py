"""Layout guards, contracts, self-tests, references, and this project's GPU kernels.

Importing this package needs no GPU and no Triton; the contract of each kernel says what it needs.
"""
