"""A decoder for the native kernels: its lowered graph becomes a flat plan of fused steps over repacked weights."""
