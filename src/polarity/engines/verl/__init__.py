"""polarity's methods inside stock verl 0.9.1: Ray, FSDP2 and vLLM, over many machines (docs/verl.md).

Nothing is imported here: launching needs no verl in this process, and verl's own processes load plugin.py.
"""
