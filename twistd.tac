import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # twistd does not

from genvm_manager import makeApplication

application = makeApplication()
