"""How each GGUF block type is rounded and read: one module per kind of block."""
