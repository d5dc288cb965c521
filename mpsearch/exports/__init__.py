"""Writing a plan in the language of other tools: one module per target, exact or refused."""
