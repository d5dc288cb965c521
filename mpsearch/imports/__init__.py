"""Reading plans of other tools: one module per form, exact or refused."""
