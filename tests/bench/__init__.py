"""What the manager costs, each figure beside a yardstick that is measured in the same minutes.

``python -m tests.bench`` measures all; nothing here can fail for being slow.
"""
