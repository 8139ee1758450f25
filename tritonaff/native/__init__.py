"""The operations on a CPU: C++ loops, compiled on first use. docs/native.md describes them."""
