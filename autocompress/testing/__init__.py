"""What third parties and our own tests need to prove an extension: tiny models and contract kits.

Import the modules by name; this package itself imports nothing heavy.
"""
