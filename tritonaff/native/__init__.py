"""The operations on a CPU: C++ loops that are compiled on first use. docs/native.md describes them."""
