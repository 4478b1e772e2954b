"""Where computation lives: devices, mesh axes, rules that place arrays on them."""
