"""Our own GPU kernels. Importing this package needs no GPU and no Triton; each kernel module says what it needs."""
