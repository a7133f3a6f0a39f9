"""Generated C++ for products on the CPU, and the compiler that builds it."""
